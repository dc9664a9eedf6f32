"""`ExpertWeights`, the weights of a layer in the kernel's layout, and how they are written down."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_megamoe import mxfp4, weight_layout
from jax_megamoe.arrays import (
    Array,
    as_array,
    require_device_memory,
    require_known_sizes,
    require_split_of_leading,
    text_of,
    type_of,
    unwrap,
)
from jax_megamoe.errors import ArgumentError, DTypeError, LayoutError, ShapeError
from jax_megamoe.operands import Leaves
from jax_megamoe.padding import cut_halves, cut_rows
from jax_megamoe.weight_layout import Format

DATA_FIELDS = Leaves._fields
META_FIELDS = ("num_experts", "hidden_size", "intermediate_size", "layout")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExpertWeights:
    """The weights of a mixture-of-experts layer as `moe` takes them; made by `quantize_experts` or `pack_experts`.

    A pytree of four arrays whose leading dimension is the experts (`layout` has the shapes), so
    `PartitionSpec("expert")` shards it as a prefix; inside `shard_map` the arrays hold this device's experts only,
    while `num_experts` still counts those of all devices. The weights of L layers stacked (`stack_experts`, or
    `jnp.stack` over the leaves) lead with L.

    `hidden_size` and `intermediate_size` are the layer's own; arrays of sizes that are no multiples of 128
    (`pad=True`) are those of the next multiples. `layout` names the memory layout and its version, from which the
    format follows; weights of another version are a `LayoutError`, also from a pickle.
    Frameworks may put each array into a Param, Variable or box of theirs, as with `jax.tree.map(nnx.Param, weights)`:
    everything here and in every function that takes weights reads through them.
    """

    gate_up: jax.Array
    gate_up_scale: jax.Array
    down: jax.Array
    down_scale: jax.Array
    num_experts: int
    hidden_size: int
    intermediate_size: int
    layout: str = weight_layout.LAYOUT_TAGS["fp8_block"]

    def __post_init__(self) -> None:
        # Nothing about the leaves: transformations put specs, None and plain objects there.
        for name in ("num_experts", "hidden_size", "intermediate_size"):
            size = getattr(self, name)
            if not isinstance(size, int | np.integer) or isinstance(size, bool) or not abs(int(size)) < 1 << 31:
                raise ShapeError(f"{name} of the weights is {text_of(size)}, wanted an int within int32: pass one.")
            if isinstance(size, np.integer):
                object.__setattr__(self, name, int(size))
        weight_layout.format_of_tag(self.layout)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle or copy does not call __init__.
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def format(self) -> Format:
        """How the weights are quantised.

        "fp8_block": E4M3 with one scale per 128x128 block; "fp8_channel": E4M3 with one scale per row (output channel);
        "mxfp4": E2M1 with a power of two per 32 columns of a row.
        """
        return weight_layout.format_of_tag(self.layout)

    @property
    def leaves(self) -> Leaves:
        """The four arrays by name, out of the boxes of frameworks."""
        return Leaves(*(unwrap(getattr(self, name)) for name in DATA_FIELDS))

    def checked(self) -> "ExpertWeights":
        """These weights with the arrays out of boxes.

        Raises `DTypeError` or `LayoutError` for arrays that such weights don't have, `ArgumentError` for open sizes.
        """
        format, sizes = self.format, (self.num_experts, self.hidden_size, self.intermediate_size)
        wanted = weight_layout.leaf_shapes(format, *sizes)
        leaves = Leaves(*(as_array(f"weights.{name}", getattr(self, name)) for name in DATA_FIELDS))
        lead = leaves.gate_up.shape[:-3]
        dtypes = weight_layout.LEAF_DTYPES[format]
        for name, leaf, (_, *tail), dtype in zip(DATA_FIELDS, leaves, wanted, dtypes, strict=True):
            require_known_sizes(f"weights.{name}", leaf)
            if leaf.dtype != dtype:
                of_dtype = jnp.dtype(dtype)
                is_raw = leaf.dtype.itemsize == 1 == of_dtype.itemsize
                advice = f"make the weights of {format} anew with pack_experts"
                if is_raw:
                    advice = f"if it holds the bytes of {format}, take .view(jax.numpy.{of_dtype.name}) of it"
                raise DTypeError(f"weights.{name} has dtype {leaf.dtype}, wanted {of_dtype.name}: {advice}.")
            if len(lead) not in (1, 2) or leaf.shape != (*lead, *tail):
                text = ", ".join(map(str, tail))
                raise LayoutError(
                    f"weights.{name} has shape {leaf.shape}, wanted [E, {text}] or [L, E, {text}] of {format}, with L "
                    "and E as in weights.gate_up: make the weights anew with pack_experts."
                )
        return dataclasses.replace(self, **leaves._asdict())

    @property
    def is_stacked(self) -> bool:
        """Whether the leaves lead with a dimension of layers."""
        return bool(self.leaves.gate_up.ndim == 5)

    @property
    def num_layers(self) -> int | None:
        """L of stacked weights, else None."""
        return int(self.leaves.gate_up.shape[0]) if self.is_stacked else None

    @property
    def nbytes(self) -> int:
        """Bytes of the four arrays, on all devices together."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.leaves)

    @property
    def sharding(self) -> Sharding | None:
        """The sharding of `gate_up`, which all leaves share; inside `jax.jit` that of its type; None for NumPy."""
        return _sharding_of(self.leaves.gate_up)

    def __repr__(self) -> str:
        """One line, also where the leaves are tracers, shapes or partition specs."""
        parts = [f"{self.num_experts} experts", f"H {self.hidden_size}", f"I {self.intermediate_size}"]
        parts += [self.format, self.layout]
        leaves = self.leaves
        if all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves):
            lead = leaves.gate_up.shape[:-3]
            if lead and lead[-1] != self.num_experts:
                parts[0] = f"{lead[-1]} of {parts[0]}"
            if len(lead) > 1:
                parts[0] = f"{' x '.join(map(str, lead[:-1]))} layers of {parts[0]}"
            parts.append(_text_of_bytes(self.nbytes))
        sharding = _sharding_of(leaves.gate_up)
        spec = sharding.spec if isinstance(sharding, NamedSharding) else leaves.gate_up
        if isinstance(spec, PartitionSpec) and any(spec):
            parts.append(_text_of_spec(spec))
        return f"ExpertWeights({', '.join(parts)})"

    def to_arrays(self) -> dict[str, Array]:
        """Arrays by name, for files of plain arrays (np.savez, safetensors, orbax); `from_arrays` is the way back.

        FP8 leaves are their bytes, uint8, since files of NumPy arrays lose the type; MXFP4 is bytes anyway. "header",
        uint8 of JSON, holds the sizes, the layout and its version.
        """
        header = write_header(tuple(getattr(self, field) for field in META_FIELDS))
        # What is in host memory stays there: a view would be a computation on the device.
        leaves = self.checked().leaves
        if any(jax.typeof(leaf).memory_space == jax.memory.Space.Host for leaf in leaves):
            leaves = Leaves(*map(np.asarray, leaves))
        return {
            "header": np.frombuffer(header, np.uint8),
            "gate_up": leaves.gate_up.view(np.uint8),
            "gate_up_scale": leaves.gate_up_scale,
            "down": leaves.down.view(np.uint8),
            "down_scale": leaves.down_scale,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> "ExpertWeights":
        """The weights that `to_arrays` gave, of JAX or NumPy arrays, which stay what they are.

        Raises `LayoutError` for weights of another layout version, and for arrays that are not those of `to_arrays`.
        """
        if not isinstance(arrays, Mapping):
            raise LayoutError(f"arrays is {type_of(arrays)}, wanted what to_arrays gave: pass a mapping of names.")
        missing = [name for name in ("header", *DATA_FIELDS) if name not in arrays]
        if missing:
            raise LayoutError(f"arrays have no {', '.join(missing)}, wanted all that to_arrays gave: save all of them.")
        leaves = Leaves(*(as_array(name, _raw_as_bytes(arrays[name])) for name in DATA_FIELDS))
        header = as_array("header", arrays["header"], "an array of uint8")
        if isinstance(header, jax.core.Tracer):
            raise LayoutError("header is traced, wanted its bytes: call from_arrays outside of jax.jit.")
        if header.dtype != np.uint8:
            raise LayoutError(f"header has dtype {header.dtype}, wanted uint8: pass the arrays as to_arrays gave them.")
        fields = read_header(np.asarray(jax.device_get(header)).tobytes())
        weights = cls(*leaves, *fields)
        if weights.format != "mxfp4":
            leaves = leaves._replace(gate_up=_as_fp8("gate_up", leaves.gate_up), down=_as_fp8("down", leaves.down))
            weights = dataclasses.replace(weights, **leaves._asdict())
        try:
            weights = weights.checked()
        except ArgumentError as error:
            raise LayoutError(f"arrays are not those that header describes: {error}") from error
        lead = leaves.gate_up.shape[:-3]
        if 0 in lead:
            raise LayoutError(f"gate_up has shape {leaves.gate_up.shape}, wanted at least one expert: save them anew.")
        if weights.num_experts % lead[-1]:
            raise LayoutError(
                f"header says num_experts={weights.num_experts}, wanted a multiple of {lead[-1]}, the experts that the "
                "arrays hold: save the weights anew."
            )
        return weights

    def unpack(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The arguments of `pack_experts`, bit for bit (with the layers in front where stacked).

        | format      | gate_up, gate rows first  | gate_up_scale                  | down, down_scale    |
        |-------------|---------------------------|--------------------------------|---------------------|
        | fp8_block   | f8e4m3fn[E, 2I, H]        | f32[E, 2I/128, H/128]          | [E, H, I], likewise |
        | fp8_channel | f8e4m3fn[E, 2I, H]        | f32[E, 2I]                     | [E, H, I], likewise |
        | mxfp4       | uint8[E, 2I, H/2]         | f8e8m0fnu[E, 2I, H/32]         | [E, H, I/2], alike  |

        Padding (`pad=True`) is cut; biases are those of `unpack_biases`.
        """
        gate_up, gate_up_scale, down, down_scale = _unpack(
            self._movable_leaves(),
            format=self.format,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
        )
        return gate_up, gate_up_scale, down, down_scale

    def unpack_biases(self) -> tuple[jax.Array, jax.Array]:
        """gate_up_bias f32[E, 2I], gate's first, and down_bias f32[E, H]: zeros where there are none."""
        leaves = self._movable_leaves()
        if self.format != "fp8_block":
            gate_up, down = _unpack_biases(
                leaves, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size
            )
        else:
            sizes = 2 * self.intermediate_size, self.hidden_size
            gate_up, down = (_zeros_for(leaves.down_scale, size=size) for size in sizes)
        return gate_up, down

    def _movable_leaves(self) -> Leaves:
        leaves = self.checked().leaves
        for name, leaf in leaves._asdict().items():
            require_device_memory(f"weights.{name}", leaf, "weights")
            require_split_of_leading(f"weights.{name}", leaf, leaf.ndim - 3)
        return leaves


# Compiled: the constants of eager operations would be transfers to the device.
@functools.partial(jax.jit, static_argnames=("format", "hidden_size", "intermediate_size"))
def _unpack(leaves: Leaves, *, format: Format, hidden_size: int, intermediate_size: int) -> Leaves:
    padded = _unpack_tiles(leaves, format, weight_layout.padded_size(intermediate_size))
    rows, lead = 2 * intermediate_size, leaves.gate_up.ndim - 3
    per_column = 2 if format == "mxfp4" else 1
    gate_up = cut_rows(cut_halves(padded.gate_up, lead, rows), lead + 1, hidden_size // per_column)
    down = cut_rows(cut_rows(padded.down, lead, hidden_size), lead + 1, intermediate_size // per_column)
    gate_up_scale, down_scale = padded.gate_up_scale, padded.down_scale
    if format != "fp8_block":
        gate_up_scale, down_scale = cut_halves(gate_up_scale, lead, rows), cut_rows(down_scale, lead, hidden_size)
    if format == "mxfp4":
        gate_up_scale = cut_rows(gate_up_scale, lead + 1, hidden_size // mxfp4.GROUP)
        down_scale = cut_rows(down_scale, lead + 1, intermediate_size // mxfp4.GROUP)
    return Leaves(gate_up, gate_up_scale, down, down_scale)


@functools.partial(jax.jit, static_argnames=("hidden_size", "intermediate_size"))
def _unpack_biases(leaves: Leaves, *, hidden_size: int, intermediate_size: int) -> tuple[jax.Array, jax.Array]:
    gate_up = weight_layout.unpack_gate_up_bias(leaves.gate_up_scale)
    down = weight_layout.unpack_down_bias(leaves.down_scale)
    return cut_halves(gate_up, -1, 2 * intermediate_size), cut_rows(down, -1, hidden_size)


@functools.partial(jax.jit, static_argnames="size")
def _zeros_for(scale: jax.Array, *, size: int) -> jax.Array:
    """f32[..., size] of zeros, split over devices like a leaf [..., H/64, ceil(I/256), 4]."""
    return jnp.broadcast_to(jnp.zeros_like(scale[..., :1, 0, 0]), (*scale.shape[:-3], size))


def _unpack_tiles(leaves: Leaves, format: Format, intermediate_size: int) -> Leaves:
    if format == "mxfp4":
        gate_up_row_scale = weight_layout.unpack_gate_up_row_scale(leaves.gate_up_scale)
        down_row_scale = weight_layout.unpack_down_row_scale(leaves.down_scale)
        gate_up, gate_up_d = mxfp4.unpack_gate_up(leaves.gate_up)
        down, down_d = mxfp4.unpack_down(leaves.down)
        return Leaves(gate_up, mxfp4.e8m0(gate_up_d, gate_up_row_scale), down, mxfp4.e8m0(down_d, down_row_scale))
    gate_up, down = weight_layout.unpack_gate_up(leaves.gate_up), weight_layout.unpack_down(leaves.down)
    if format == "fp8_channel":
        gate_up_scale = weight_layout.unpack_gate_up_row_scale(leaves.gate_up_scale)
        down_scale = weight_layout.unpack_down_row_scale(leaves.down_scale)
    else:
        gate_up_scale = weight_layout.unpack_gate_up_scale(leaves.gate_up_scale)
        down_scale = weight_layout.unpack_down_scale(leaves.down_scale, intermediate_size)
    return Leaves(gate_up, gate_up_scale, down, down_scale)


jax.tree_util.register_dataclass(ExpertWeights, data_fields=DATA_FIELDS, meta_fields=META_FIELDS)


_MAX_HEADER_BYTES = 10_000  # `write_header` makes some 100.


def write_header(fields: tuple[Any, ...]) -> bytes:
    """The values of `META_FIELDS` as bytes."""
    return json.dumps(dict(zip(META_FIELDS, fields, strict=True))).encode()


def read_header(header: bytes) -> tuple[Any, ...]:
    """The inverse of `write_header`. Raises `LayoutError` for another version of the layout, and for other bytes."""
    try:
        if len(header) > _MAX_HEADER_BYTES:  # Python's objects for JSON take 25 times its size.
            raise ValueError
        fields = json.loads(header)
        *sizes, tag = (fields[name] for name in META_FIELDS)
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LayoutError("header is not that of ExpertWeights: pass the arrays as to_arrays gave them.") from error
    weight_layout.format_of_tag(tag)
    return (*sizes, tag)


def _raw_as_bytes(value: object) -> object:
    # np.savez keeps leaves of the pytree itself as raw bytes of type V1.
    held = unwrap(value)
    return held.view(np.uint8) if isinstance(held, np.ndarray) and held.dtype == np.dtype("V1") else held


def _as_fp8(name: str, array: Array) -> Array:
    if array.dtype == jnp.float8_e4m3fn:
        return array
    if array.dtype != np.uint8:
        raise LayoutError(f"{name} has dtype {array.dtype}, wanted the bytes that to_arrays gave: save them anew.")
    return array.view(jnp.float8_e4m3fn)


def _sharding_of(leaf: Any) -> Sharding | None:
    return jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)


def _text_of_spec(spec: PartitionSpec) -> str:
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return f"P({', '.join(map(repr, axes))})"


def _text_of_bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
