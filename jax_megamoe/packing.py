"""Making `ExpertWeights`: from float weights, from FP8 blocks as checkpoints hold them, from layers one by one."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import quantization, weight_checks, weight_layout
from jax_megamoe.arrays import (
    Array,
    as_array,
    require_device_memory,
    require_known_sizes,
    require_same_split,
    require_split_of_leading,
    type_of,
    unwrap,
)
from jax_megamoe.errors import ArgumentError, LayoutError, ShapeError, ShardingError
from jax_megamoe.weight_checks import Order
from jax_megamoe.weights import ExpertWeights

Progress = Callable[[int, int], None]


def quantize_experts(
    gate: Array,
    up: Array,
    down: Array,
    *,
    order: Order = "out_in",
    num_experts: int | None = None,
    progress: Progress | None = None,
) -> ExpertWeights:
    """Quantises float weights to FP8 with one scale per 128x128 block, and packs them.

    Values that a power-of-two scale makes exact are kept exactly (docs/numerics.md). Input, result and what is needed
    meanwhile are together at most twice the input for matrices of at least six blocks, less for float32, inside
    `jax.jit` too; NumPy arrays are taken to the device one expert at a time.

    Args:
      gate, up: bf16, f16, f32 or f64 [E, I, H], H and I multiples of 128; with order="in_out" [E, H, I].
      down: the same types, [E, H, I]; with order="in_out" [E, I, H].
      order: "out_in" as PyTorch and checkpoints hold matrices, "in_out" as Flax and MaxText do. Where all three are in
        the other order they are those of a layer with H and I exchanged, and if H = I nothing can tell: say the order.
      num_experts: how many experts there are on all devices together, where the arrays hold a part of them, as inside
        `jax.shard_map`; None for those that the arrays hold. Copies of an expert count as experts of their own.
      progress: called with (experts done, E): after each expert of NumPy arrays, at the end for those of JAX.

    Raises:
      ShapeError, DTypeError: while tracing, for arguments that cannot be served.
      LayoutError: for weights that are packed already, or an unknown order.
    """
    _check_progress(progress)
    gate, up, down = (_array(name, value) for name, value in (("gate", gate), ("up", up), ("down", down)))
    weight_checks.check_order(order)
    weight_checks.check_floats(gate, up, down, order)
    _check_split(gate=gate, up=up, down=down)
    num_held = gate.shape[0]
    num_experts = weight_checks.count_experts(num_held, num_experts)
    if num_held > 1 and all(isinstance(array, np.ndarray) for array in (gate, up, down)):
        parts = (
            _quantize(*(array[expert : expert + 1] for array in (gate, up, down)), order=order)
            for expert in range(num_held)
        )
        weights = _fill(parts, num_held, "experts", progress)
    else:
        weights = _quantize(gate, up, down, order=order)
        if progress is not None:
            progress(num_held, num_held)
    return dataclasses.replace(weights, num_experts=num_experts)


def pack_experts(
    gate_up: Array, gate_up_scale: Array, down: Array, down_scale: Array, *, num_experts: int | None = None
) -> ExpertWeights:
    """Packs FP8 weights with a scale per 128x128 block, as checkpoints hold them; nothing is rounded.

    Args:
      gate_up: f8e4m3fn[E, 2I, H], gate rows first; H and I multiples of 128.
      gate_up_scale: f32, bf16 or f8e8m0fnu [E, 2I/128, H/128], or the bytes of the last in uint8: a byte b is
        2^(b - 127), and 255 is NaN, which makes NaN of what its block reaches. A value of the layer is weight * scale.
      down: f8e4m3fn[E, H, I].
      down_scale: as gate_up_scale, [E, H/128, I/128].
      num_experts: as in `quantize_experts`.

    Raises:
      ShapeError, DTypeError: for arguments that cannot be served, while tracing; also for floats on this host that are
        E8M0 exponents after a cast: whole numbers of at least 64, not all powers of two.
      LayoutError: for weights that are packed already.
    """
    arrays = {"gate_up": gate_up, "gate_up_scale": gate_up_scale, "down": down, "down_scale": down_scale}
    blocks = [_array(name, value) for name, value in arrays.items()]
    weight_checks.check_blocks(*blocks)
    _check_split(**dict(zip(arrays, blocks, strict=True)))
    num_experts = weight_checks.count_experts(blocks[2].shape[0], num_experts)
    packed: ExpertWeights = _pack(*blocks)
    return dataclasses.replace(packed, num_experts=num_experts)


def stack_experts(
    weights: Iterable[ExpertWeights], *, num_layers: int | None = None, progress: Progress | None = None
) -> ExpertWeights:
    """Stacks the weights of equally shaped layers, for `moe(..., layer=i)`.

    Args:
      weights: the layers; any iterable.
      num_layers: how many there are. Given, each layer goes into its place of the result as it comes, so that with a
        generator little more than the result is in memory; else all layers are there beside it.
      progress: called with (layers done, num_layers) after each layer where `num_layers` is given.

    Raises `ShapeError` for layers of different shapes or another number of them, `LayoutError` for other things.
    """
    _check_progress(progress)
    layers = _each_layer(weights)
    if num_layers is not None:
        num_layers = weight_checks.require_count("num_layers", num_layers)
        return _fill(layers, num_layers, "layers", progress)
    gathered = list(layers)
    if not gathered:
        raise ShapeError("weights is an empty sequence, wanted the ExpertWeights of at least one layer: pass some.")
    stacked: ExpertWeights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gathered)
    return stacked


@functools.partial(jax.jit, static_argnames="order")
def _quantize(gate: jax.Array, up: jax.Array, down: jax.Array, *, order: Order) -> ExpertWeights:
    row_axis = 1 if order == "out_in" else 2

    def gate_up_tiles(*parts: jax.Array) -> tuple[jax.Array, jax.Array]:
        quantized = [_materialize(quantization.quantize_blocks(part)) for part in parts]
        values, scale = (jnp.concatenate(both, axis=1) for both in zip(*quantized, strict=True))
        return weight_layout.pack_gate_up(values), weight_layout.pack_gate_up_scale(scale)

    def down_tiles(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, scale = _materialize(quantization.quantize_blocks(part))
        return weight_layout.pack_down(values), weight_layout.pack_down_scale(scale)

    columns_axis = 3 - row_axis
    return ExpertWeights(
        *_map_parts(gate_up_tiles, gate, up, row_axis=row_axis, column_blocks=1),
        # Two blocks of columns share a row of the packed scales.
        *_map_parts(down_tiles, down, row_axis=row_axis, column_blocks=2),
        num_experts=gate.shape[0],
        hidden_size=gate.shape[columns_axis],
        intermediate_size=down.shape[columns_axis],
    )


def _materialize[T](value: T) -> T:
    # Fused with packing, which reads each byte through several exchanges, quantising would be done several times.
    materialized: T = jax.lax.optimization_barrier(value)
    return materialized


# A weight is quantised in so many parts at least, where it has so many blocks: what one needs meanwhile is then less
# than a sixth of the input. Measured as `memory_analysis` of the compiled program.
_MIN_PARTS = 6


def _map_parts(
    make_tiles: Callable[..., tuple[jax.Array, jax.Array]], *weights: jax.Array, row_axis: int, column_blocks: int
) -> tuple[jax.Array, jax.Array]:
    """The packed tiles of weights [E, N, K], transposed if row_axis is 2, that `make_tiles` gives for parts of them.

    Parts are 128 rows and a multiple of `column_blocks` blocks of columns, or all. One after the other goes into its
    place, since float32 copies of all weights would take several times the room of the input. Rows and columns are
    split and not experts, which may be split over devices.
    """
    num_rows, num_columns = weights[0].shape[row_axis], weights[0].shape[3 - row_axis]
    row_parts = num_rows // weight_layout.BLOCK
    wanted = -(-_MIN_PARTS // row_parts)
    units = num_columns // (column_blocks * weight_layout.BLOCK)
    is_whole = num_columns % (column_blocks * weight_layout.BLOCK) == 0
    column_parts = next((n for n in range(wanted, units + 1) if units % n == 0), units) if is_whole and units else 1
    width = num_columns // column_parts

    def tiles_of(row_part: jax.Array, column_part: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts = []
        for weight in weights:
            part = jax.lax.dynamic_slice_in_dim(weight, row_part * weight_layout.BLOCK, weight_layout.BLOCK, row_axis)
            part = jax.lax.dynamic_slice_in_dim(part, column_part * width, width, 3 - row_axis)
            parts.append(part if row_axis == 1 else part.swapaxes(1, 2))
        return make_tiles(*parts)

    def put(index: jax.Array, joined: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        row_part, column_part = index // column_parts, index % column_parts
        return tuple(
            jax.lax.dynamic_update_slice(whole, _as_bytes(tiles), (0, 2 * row_part, tiles.shape[2] * column_part, 0))
            for whole, tiles in zip(joined, tiles_of(row_part, column_part), strict=True)
        )

    # Of any values, since all are overwritten; made of a weight, so that they are split over devices as it is.
    origin = weights[0][:, :1, :1, None]
    start = tuple(
        jnp.broadcast_to(
            _as_bytes(origin.astype(tiles.dtype)),
            (tiles.shape[0], 2 * row_parts, tiles.shape[2] * column_parts, tiles.shape[3]),
        )
        for tiles in jax.eval_shape(tiles_of, 0, 0)
    )
    values, scale = jax.lax.fori_loop(0, row_parts * column_parts, put, start)
    return jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn), scale


@jax.jit
def _pack(gate_up: jax.Array, gate_up_scale: jax.Array, down: jax.Array, down_scale: jax.Array) -> ExpertWeights:
    num_experts, hidden_size, intermediate_size = down.shape
    return ExpertWeights(
        gate_up=weight_layout.pack_gate_up(gate_up),
        gate_up_scale=weight_layout.pack_gate_up_scale(quantization.widen_scale(gate_up_scale)),
        down=weight_layout.pack_down(down),
        down_scale=weight_layout.pack_down_scale(quantization.widen_scale(down_scale)),
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
    )


def _fill(parts: Iterator[ExpertWeights], count: int, along: str, progress: Progress | None) -> ExpertWeights:
    """Joins `count` parts along "experts", of which each has one, or along "layers", a new dimension.

    Each is copied into the result as it comes and let go, so that there is never more than one beside the result.
    """
    result: ExpertWeights | None = None
    index, done = None, 0
    while (part := next(parts, None)) is not None:
        if done < count:
            if result is None:
                result, index = _start(part, count=count, along=along)
            result, index = _put(result, part, index)
            # Else the queue of parts would grow as large as the result.
            jax.block_until_ready(result)
        del part
        done += 1
        if progress is not None and done <= count:
            progress(done, count)
    if result is None or done != count:
        raise ShapeError(f"num_layers is {count}, wanted {done}, as many as weights gave: pass their number.")
    return result


@functools.partial(jax.jit, static_argnames=("count", "along"))
def _start(part: ExpertWeights, *, count: int, along: str) -> tuple[ExpertWeights, jax.Array]:
    """Room for the parts, and the index of the first."""

    def room(leaf: jax.Array) -> jax.Array:
        # Copies of the first part, all to be overwritten: they are split over devices as it is.
        return jnp.broadcast_to(leaf, (count, *(leaf.shape[1:] if along == "experts" else leaf.shape)))

    return jax.tree.map(room, part), jnp.int32(0)


@functools.partial(jax.jit, donate_argnums=(0, 2))
def _put(whole: ExpertWeights, part: ExpertWeights, index: jax.Array) -> tuple[ExpertWeights, jax.Array]:
    """The parts with one more in its place, and the index of the next, which so is never moved to a device."""

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        updated = jax.lax.dynamic_update_index_in_dim(_as_bytes(whole), _as_bytes(part), index, 0)
        return jax.lax.bitcast_convert_type(updated, whole.dtype)

    return jax.tree.map(put, whole, part), index + 1


def _as_bytes(array: jax.Array) -> jax.Array:
    # XLA's CPU backend moves FP8 through half precision, and then all of an array of which a part is updated.
    return jax.lax.bitcast_convert_type(array, jnp.uint8) if array.dtype.itemsize == 1 else array


def _each_layer(weights: Iterable[ExpertWeights]) -> Iterator[ExpertWeights]:
    """Layers as they come, checked to be of one shape; holds none of them."""
    held = unwrap(weights)
    if isinstance(held, ExpertWeights) or not isinstance(held, Iterable):
        raise LayoutError(f"weights is {type_of(held)}, wanted the ExpertWeights of several layers: pass a sequence.")
    layers = iter(held)
    first_shape, first_shardings = None, None
    for layer in itertools.count():
        try:
            one = unwrap(next(layers))
        except StopIteration:
            return
        if not isinstance(one, ExpertWeights):
            raise LayoutError(
                f"weights[{layer}] is {type_of(one)}, wanted ExpertWeights: "
                "make them with quantize_experts from float weights, or with pack_experts from FP8 blocks."
            )
        one = one.checked()
        for name, leaf in one.leaves._asdict().items():
            require_device_memory(f"weights[{layer}].{name}", leaf, f"weights[{layer}]")
        if one.is_stacked:
            raise ShapeError(f"weights[{layer}] is stacked already, wanted one layer: pass the layers one by one.")
        shape = (one.gate_up.shape, one.num_experts, one.hidden_size, one.intermediate_size)
        shardings = [jax.typeof(leaf).sharding for leaf in one.leaves]
        if first_shape is None:
            first_shape, first_shardings = shape, shardings
        if shape != first_shape:
            raise ShapeError(
                f"weights[{layer}] has (gate_up shape, E, H, I) {shape}, wanted {first_shape} like layer 0: "
                "stack layers of one shape."
            )
        if shardings != first_shardings:
            raise ShardingError(
                f"weights[{layer}].gate_up is {jax.typeof(one.gate_up)}, wanted all of it split like layer 0, over the "
                "same mesh: put the layers there with jax.device_put."
            )
        box = [one]
        del one
        yield box.pop()


def _check_split(**arrays: Array) -> None:
    """Raises `ShardingError` unless explicit types split all arrays over the same axes along the experts alone."""
    first = next(iter(arrays))
    for name, array in arrays.items():
        require_split_of_leading(name, array, 1)
        require_same_split(name, array, first, arrays[first])


def _check_progress(progress: object) -> None:
    if progress is not None and not callable(progress):
        raise ArgumentError(f"progress is {progress!r}, wanted a function of (done, of how many), or None: pass one.")


def _array(name: str, value: object) -> Array:
    held = unwrap(value)
    if isinstance(held, ExpertWeights):
        raise LayoutError(f"{name} is an ExpertWeights, wanted an array: it is packed already, pass it to moe.")
    array = as_array(name, held)
    require_device_memory(name, array)
    require_known_sizes(name, array)
    return array
