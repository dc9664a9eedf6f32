"""Expert weights in the kernel's layout: from float weights, or from FP8 blocks as checkpoints hold them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import layout as layouts
from jax_megamoe import quantization
from jax_megamoe.errors import DTypeError, LayoutError, ShapeError

Array = jax.Array | np.ndarray

_FP8 = np.dtype(jnp.float8_e4m3fn)


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights of a mixture-of-experts layer as `moe` takes them; made by `quantize_experts` or `pack_experts`.

    A pytree of four arrays whose leading dimension is the experts (`layout` has the shapes), so
    `PartitionSpec("expert")` shards it as a prefix; inside `shard_map` the arrays hold this device's experts only,
    while `num_experts` still counts those of all devices. The weights of L layers stacked (`stack_experts`, or
    `jnp.stack` over the leaves) lead with L.
    """

    gate_up: jax.Array
    gate_up_scale: jax.Array
    down: jax.Array
    down_scale: jax.Array
    num_experts: int
    hidden_size: int
    intermediate_size: int
    layout: str = layouts.LAYOUT_TAG

    def __post_init__(self) -> None:
        # Nothing about the leaves: transformations put specs, None and plain objects there.
        if self.layout != layouts.LAYOUT_TAG:
            raise LayoutError(
                f"weights have layout {self.layout!r}, this version wants {layouts.LAYOUT_TAG!r}: "
                "unpack them with the version that wrote them and call pack_experts."
            )

    @property
    def is_stacked(self) -> bool:
        """Whether the leaves lead with a dimension of layers."""
        return self.gate_up.ndim == 5

    def unpack(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The arguments of `pack_experts`, bit for bit (with the layers in front where stacked).

        gate_up f8e4m3fn[E, 2I, H] (gate rows first), gate_up_scale f32[E, 2I/128, H/128],
        down f8e4m3fn[E, H, I], down_scale f32[E, H/128, I/128].
        """
        leaves = (self.gate_up, self.gate_up_scale, self.down, self.down_scale)
        return layouts.unpack(*leaves, intermediate_size=self.intermediate_size)


jax.tree_util.register_dataclass(
    ExpertWeights,
    data_fields=["gate_up", "gate_up_scale", "down", "down_scale"],
    meta_fields=["num_experts", "hidden_size", "intermediate_size", "layout"],
)


def quantize_experts(gate: Array, up: Array, down: Array) -> ExpertWeights:
    """Quantises float weights to FP8 with one scale per 128x128 block, and packs them.

    gate, up: float [E, I, H]; down: float [E, H, I]; H and I multiples of 128.
    Raises `ShapeError`, `DTypeError`, or `LayoutError` for weights that are packed already.
    """
    for name, array in (("gate", gate), ("up", up), ("down", down)):
        _require_array(name, array)
        if not jnp.issubdtype(array.dtype, jnp.floating) or jnp.dtype(array.dtype).itemsize < 2:
            raise DTypeError(
                f"{name} has dtype {array.dtype}, wanted bfloat16, float16 or float32: "
                "FP8 blocks with their scales go to pack_experts."
            )
    num_experts, intermediate_size, hidden_size = _require_rank("gate", gate.shape, "[E, I, H]")
    _require_multiples(hidden_size, intermediate_size)
    _require_shape("up", up.shape, (num_experts, intermediate_size, hidden_size), "[E, I, H] like gate")
    _require_shape("down", down.shape, (num_experts, hidden_size, intermediate_size), "[E, H, I]")
    return _quantize(gate, up, down)


def pack_experts(gate_up: Array, gate_up_scale: Array, down: Array, down_scale: Array) -> ExpertWeights:
    """Packs FP8 weights with a scale per 128x128 block, as checkpoints hold them; nothing is rounded.

    gate_up: f8e4m3fn[E, 2I, H], gate rows first; gate_up_scale: f32 or bf16 [E, 2I/128, H/128];
    down: f8e4m3fn[E, H, I]; down_scale: f32 or bf16 [E, H/128, I/128]; H and I multiples of 128.
    A value of the layer is weight * scale. Raises `ShapeError`, `DTypeError`, or `LayoutError` for packed weights.
    """
    block = layouts.BLOCK
    arrays = {"gate_up": gate_up, "gate_up_scale": gate_up_scale, "down": down, "down_scale": down_scale}
    for name, array in arrays.items():
        _require_array(name, array)
        if name.endswith("_scale"):
            if array.dtype not in (jnp.float32, jnp.bfloat16):
                raise DTypeError(f"{name} has dtype {array.dtype}, wanted float32 or bfloat16: cast it.")
        elif array.dtype != _FP8:
            raise DTypeError(
                f"{name} has dtype {array.dtype}, wanted float8_e4m3fn: float weights go to quantize_experts, "
                "raw bytes through .view(ml_dtypes.float8_e4m3fn)."
            )
    num_experts, hidden_size, intermediate_size = _require_rank("down", down.shape, "[E, H, I]")
    _require_multiples(hidden_size, intermediate_size)
    e, h, i = num_experts, hidden_size, intermediate_size
    _require_shape("gate_up", gate_up.shape, (e, 2 * i, h), "[E, 2I, H] for down's E, H, I")
    _require_shape("gate_up_scale", gate_up_scale.shape, (e, 2 * i // block, h // block), "[E, 2I/128, H/128]")
    _require_shape("down_scale", down_scale.shape, (e, h // block, i // block), "[E, H/128, I/128]")
    return _pack(gate_up, gate_up_scale, down, down_scale)


def stack_experts(weights: Sequence[ExpertWeights]) -> ExpertWeights:
    """Stacks the weights of equally shaped layers, for `moe(..., layer=i)`. Raises `ShapeError`."""
    if not weights:
        raise ShapeError("weights is an empty sequence, wanted the ExpertWeights of at least one layer: pass some.")
    shapes = [(w.gate_up.shape, w.num_experts, w.hidden_size, w.intermediate_size) for w in weights]
    for layer, (w, shape) in enumerate(zip(weights, shapes, strict=True)):
        if w.is_stacked:
            raise ShapeError(f"weights[{layer}] is stacked already, wanted one layer: pass the layers one by one.")
        if shape != shapes[0]:
            raise ShapeError(
                f"weights[{layer}] has (gate_up shape, E, H, I) {shape}, wanted {shapes[0]} like layer 0: "
                "stack layers of one shape."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)


@jax.jit
def _quantize(gate: jax.Array, up: jax.Array, down: jax.Array) -> ExpertWeights:
    # Gate and up have blocks of their own, so quantising them joined gives the same scales.
    joined = jnp.concatenate([gate.astype(jnp.float32), up.astype(jnp.float32)], axis=-2)
    return _pack(*quantization.quantize_blocks(joined), *quantization.quantize_blocks(down))


@jax.jit
def _pack(gate_up: jax.Array, gate_up_scale: jax.Array, down: jax.Array, down_scale: jax.Array) -> ExpertWeights:
    num_experts, hidden_size, intermediate_size = down.shape
    return ExpertWeights(
        gate_up=layouts.pack_gate_up(gate_up),
        gate_up_scale=layouts.pack_gate_up_scale(gate_up_scale.astype(jnp.float32)),
        down=layouts.pack_down(down),
        down_scale=layouts.pack_down_scale(down_scale.astype(jnp.float32)),
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
    )


def _require_array(name: str, value: Any) -> None:
    if isinstance(value, ExpertWeights):
        raise LayoutError(f"{name} is an ExpertWeights, wanted an array: it is packed already, pass it to moe.")
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise DTypeError(f"{name} is a {type(value).__name__}, wanted a JAX or NumPy array: convert it.")


def _require_rank(name: str, shape: tuple[int, ...], wanted: str) -> tuple[int, int, int]:
    if len(shape) == 4 and shape[-1] in (layouts.PLANE_BYTES, 2 * layouts.PLANE_BYTES):
        raise LayoutError(
            f"{name} has shape {shape}, wanted {wanted}: this is a packed leaf, unpack() the weights first."
        )
    if len(shape) != 3:
        raise ShapeError(f"{name} has shape {shape}, wanted {wanted}: pass the experts of one layer.")
    return shape[0], shape[1], shape[2]


def _require_multiples(hidden_size: int, intermediate_size: int) -> None:
    for name, size in (("hidden size H", hidden_size), ("intermediate size I", intermediate_size)):
        if size <= 0 or size % layouts.BLOCK:
            raise ShapeError(
                f"{name} is {size}, wanted a positive multiple of {layouts.BLOCK}: pad the weights with zeros."
            )


def _require_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...], meaning: str) -> None:
    if tuple(shape) != wanted:
        raise ShapeError(
            f"{name} has shape {tuple(shape)}, wanted {wanted}, that is {meaning}: reshape or transpose it."
        )
