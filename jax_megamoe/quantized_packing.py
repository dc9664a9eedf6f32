"""Quantising float weights and packing them, part by part, so that little memory is needed beside input and result."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jax_megamoe import mxfp4, quantization, weight_layout
from jax_megamoe.operands import Leaves
from jax_megamoe.padding import pad_biases, pad_rows, slice_padded
from jax_megamoe.weight_checks import Order
from jax_megamoe.weight_layout import Format

# Tiles of a part of the weights: of parts of them [E, 128, columns], and of parts of what belongs to their rows.
MakeTiles = Callable[..., tuple[jax.Array, ...]]
# Of a format with scales of rows: gate_up and down, packed, and the scales f32[E, 2I] and f32[E, H].
Packed = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnames=("order", "format"))
def quantize_and_pack(
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    gate_up_bias: jax.Array | None = None,
    down_bias: jax.Array | None = None,
    *,
    order: Order,
    format: Format,
) -> Leaves:
    """The packed leaves of float weights that are checked, with zeros behind sizes that are no multiples of 128."""
    row_axis = 1 if order == "out_in" else 2
    hidden, intermediate = (weight_layout.padded_size(down.shape[axis]) for axis in (row_axis, 3 - row_axis))
    gate_up_bias, down_bias = pad_biases(gate_up_bias, down_bias, hidden, intermediate)
    if format == "fp8_block":
        return _of_blocks(gate, up, down, row_axis)
    make = _of_channels if format == "fp8_channel" else _of_mxfp4
    gate_up, packed_down, gate_up_scale, down_scale = make(gate, up, down, row_axis)
    return Leaves(
        gate_up,
        weight_layout.pack_gate_up_row_scale(gate_up_scale, gate_up_bias),
        packed_down,
        weight_layout.pack_down_row_scale(down_scale, down_bias),
    )


def _of_blocks(gate: jax.Array, up: jax.Array, down: jax.Array, row_axis: int) -> Leaves:
    def gate_up_tiles(*parts: jax.Array) -> tuple[jax.Array, jax.Array]:
        quantized = [_materialize(quantization.quantize_blocks(part)) for part in parts]
        values, scale = (jnp.concatenate(both, axis=1) for both in zip(*quantized, strict=True))
        return weight_layout.pack_gate_up(values), weight_layout.pack_gate_up_scale(scale)

    def down_tiles(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, scale = _materialize(quantization.quantize_blocks(part))
        return weight_layout.pack_down(values), weight_layout.pack_down_scale(scale)

    return Leaves(
        *_map_parts(gate_up_tiles, [gate, up], row_axis=row_axis),
        # Two blocks of columns share a row of the packed scales.
        *_map_parts(down_tiles, [down], row_axis=row_axis, column_blocks=2),
    )


def _of_channels(gate: jax.Array, up: jax.Array, down: jax.Array, row_axis: int) -> Packed:
    # Of whole rows, and therefore before the parts, which are cut along the columns too.
    gate_scale, up_scale, down_scale = (_row_scales(weight, row_axis) for weight in (gate, up, down))

    def gate_up_tiles(gate: jax.Array, up: jax.Array, *scales: jax.Array) -> tuple[jax.Array]:
        parts = (quantization.quantize_rows(*both) for both in zip((gate, up), scales, strict=True))
        return (weight_layout.pack_gate_up(_materialize(jnp.concatenate(list(parts), axis=1))),)

    def down_tiles(part: jax.Array, scale: jax.Array) -> tuple[jax.Array]:
        return (weight_layout.pack_down(_materialize(quantization.quantize_rows(part, scale))),)

    (gate_up,) = _map_parts(gate_up_tiles, [gate, up], [gate_scale, up_scale], row_axis=row_axis)
    (packed_down,) = _map_parts(down_tiles, [down], [down_scale], row_axis=row_axis)
    return gate_up, packed_down, jnp.concatenate([gate_scale, up_scale], axis=1), down_scale


def _row_scales(weight: jax.Array, row_axis: int) -> jax.Array:
    """The scales [E, N] of the rows, some rows after the other: it takes several float32 copies of them."""
    num_rows = weight_layout.padded_size(weight.shape[row_axis])
    size = num_rows // _SCALE_PARTS

    def put(index: jax.Array, scales: jax.Array) -> jax.Array:
        part = slice_padded(weight, index * size, size, row_axis)
        part_scales = quantization.row_scales(part, 3 - row_axis)
        return jax.lax.dynamic_update_slice_in_dim(scales, part_scales, index * size, 1)

    # As in `_map_parts`.
    start = jnp.broadcast_to(weight[:, :1, 0].astype(jnp.float32), (weight.shape[0], num_rows))
    return jax.lax.fori_loop(0, _SCALE_PARTS, put, start)


def _of_mxfp4(gate: jax.Array, up: jax.Array, down: jax.Array, row_axis: int) -> Packed:
    def rows(weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The exponents [E, N, K/32], and those that are stored, and the scales [E, N] of the rows."""
        magnitudes = mxfp4.group_magnitudes(weight, 3 - row_axis)
        exponents, is_zero = mxfp4.exponents_of(magnitudes if row_axis == 1 else magnitudes.swapaxes(1, 2))
        # Those of zeros, behind what there is.
        num_rows, num_columns = (weight_layout.padded_size(weight.shape[axis]) for axis in (row_axis, 3 - row_axis))
        exponents, is_zero = (
            pad_rows(pad_rows(array, 1, num_rows, of_zeros), 2, num_columns // mxfp4.GROUP, of_zeros)
            for array, of_zeros in ((exponents, mxfp4.ONE_EXPONENT), (is_zero, True))
        )
        base, scale = mxfp4.row_scales(exponents, is_zero)
        return _materialize((exponents, exponents - base[..., None], scale))

    def gate_up_tiles(gate: jax.Array, up: jax.Array, *exponents: jax.Array) -> tuple[jax.Array]:
        codes = jnp.concatenate([mxfp4.quantize(gate, exponents[0]), mxfp4.quantize(up, exponents[1])], axis=1)
        return (mxfp4.pack_gate_up(_materialize(codes), jnp.concatenate(exponents[2:], axis=1)),)

    def down_tiles(part: jax.Array, exponents: jax.Array, stored: jax.Array) -> tuple[jax.Array]:
        return (mxfp4.pack_down(_materialize(mxfp4.quantize(part, exponents)), stored),)

    (gate_e, gate_d, gate_scale), (up_e, up_d, up_scale), (down_e, down_d, down_scale) = map(rows, (gate, up, down))
    (gate_up,) = _map_parts(gate_up_tiles, [gate, up], [gate_e, up_e, gate_d, up_d], row_axis=row_axis)
    (packed_down,) = _map_parts(down_tiles, [down], [down_e, down_d], row_axis=row_axis)
    return gate_up, packed_down, jnp.concatenate([gate_scale, up_scale], axis=1), down_scale


def _materialize[T](value: T) -> T:
    # Fused with packing, which reads each byte through several exchanges, quantising would be done several times.
    materialized: T = jax.lax.optimization_barrier(value)
    return materialized


# A weight is quantised in so many parts at least, where it has so many blocks: what one needs meanwhile is then less
# than a sixth of the input. Measured as `memory_analysis` of the compiled program.
_MIN_PARTS = 6
# The parts of rows whose scales are found together; a divisor of 128.
_SCALE_PARTS = 16


def _map_parts(
    make_tiles: MakeTiles,
    weights: Sequence[jax.Array],
    of_rows: Sequence[jax.Array] = (),
    *,
    row_axis: int,
    column_blocks: int = 1,
) -> tuple[jax.Array, ...]:
    """The packed tiles of weights [E, N, K], transposed if row_axis is 2, that `make_tiles` gives for parts of them.

    Where N or K is no multiple of 128, the parts at the end have zeros behind. Parts are 128 rows and a multiple of
    `column_blocks` blocks of columns, or all. One after the other goes into its place, since float32 copies of all
    weights would take several times the room of the input. Rows and columns are split and not experts, which may be
    split over devices. `of_rows` is what belongs to whole rows, [E, N], or to groups of them, [E, N, groups]:
    `make_tiles` gets the parts of these after those of the weights.
    """
    num_rows, num_columns = (weight_layout.padded_size(weights[0].shape[axis]) for axis in (row_axis, 3 - row_axis))
    row_parts = num_rows // weight_layout.BLOCK
    wanted = -(-_MIN_PARTS // row_parts)
    units = num_columns // (column_blocks * weight_layout.BLOCK)
    is_whole = num_columns % (column_blocks * weight_layout.BLOCK) == 0
    column_parts = next((n for n in range(wanted, units + 1) if units % n == 0), units) if is_whole and units else 1

    def part_of(
        array: jax.Array, row_part: jax.Array, column_part: jax.Array, rows: int, columns: int, num_columns: int
    ) -> jax.Array:
        part = slice_padded(array, row_part * weight_layout.BLOCK, weight_layout.BLOCK, rows)
        if array.ndim == 2:
            return part
        size = num_columns // column_parts
        return jax.lax.dynamic_slice_in_dim(pad_rows(part, columns, num_columns), column_part * size, size, columns)

    def tiles_of(row_part: jax.Array, column_part: jax.Array) -> tuple[jax.Array, ...]:
        where = row_part, column_part
        parts = [part_of(weight, *where, row_axis, 3 - row_axis, num_columns) for weight in weights]
        parts = [part if row_axis == 1 else part.swapaxes(1, 2) for part in parts]
        return make_tiles(*parts, *(part_of(array, *where, 1, 2, array.shape[-1]) for array in of_rows))

    def put(index: jax.Array, joined: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        row_part, column_part = index // column_parts, index % column_parts
        return tuple(
            jax.lax.dynamic_update_slice(whole, as_bytes(tiles), (0, 2 * row_part, tiles.shape[2] * column_part, 0))
            for whole, tiles in zip(joined, tiles_of(row_part, column_part), strict=True)
        )

    # Of any values, since all are overwritten; made of a weight, so that they are split over devices as it is.
    origin = weights[0][:, :1, :1, None]
    made = jax.eval_shape(tiles_of, 0, 0)
    start = tuple(
        jnp.broadcast_to(
            as_bytes(origin.astype(tiles.dtype)),
            (tiles.shape[0], 2 * row_parts, tiles.shape[2] * column_parts, tiles.shape[3]),
        )
        for tiles in made
    )
    joined = jax.lax.fori_loop(0, row_parts * column_parts, put, start)
    return tuple(jax.lax.bitcast_convert_type(whole, tiles.dtype) for whole, tiles in zip(joined, made, strict=True))


def as_bytes(array: jax.Array) -> jax.Array:
    """FP8 as uint8, other arrays as they are."""
    # XLA's CPU backend moves FP8 through half precision, and then all of an array of which a part is updated.
    return jax.lax.bitcast_convert_type(array, jnp.uint8) if array.dtype.itemsize == 1 else array
