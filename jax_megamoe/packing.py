"""Making `ExpertWeights`: from float weights, from quantised ones as checkpoints hold them, from layers one by one."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import mxfp4, quantization, weight_checks, weight_layout
from jax_megamoe.arrays import (
    Array,
    as_array,
    check_flag,
    devices_of,
    require_device_memory,
    require_known_sizes,
    require_same_devices,
    require_same_split,
    require_split_of_leading,
    text_of,
    type_of,
    unwrap,
)
from jax_megamoe.errors import ArgumentError, LayoutError, ShapeError, ShardingError
from jax_megamoe.operands import Leaves
from jax_megamoe.padding import pad_biases, pad_halves, pad_rows
from jax_megamoe.quantized_packing import as_bytes, quantize_and_pack
from jax_megamoe.weight_checks import Biases, Order
from jax_megamoe.weight_layout import Format
from jax_megamoe.weights import ExpertWeights

Progress = Callable[[int, int], None]


def quantize_experts(
    gate: Array,
    up: Array,
    down: Array,
    *,
    order: Order = "out_in",
    format: Format = "fp8_block",
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    pad: bool = False,
    num_experts: int | None = None,
    progress: Progress | None = None,
) -> ExpertWeights:
    """Quantises float weights, and packs them.

    | format      | a weight becomes                                                     | bits |
    |-------------|----------------------------------------------------------------------|------|
    | fp8_block   | E4M3 times one scale per 128x128 block                               | 8    |
    | fp8_channel | E4M3 times one scale per row, that is per output channel             | 8    |
    | mxfp4       | E2M1 times a power of two (E8M0) per 32 columns of a row, as OCP MX  | 4.25 |

    Values that the format holds exactly are kept exactly: those that a power of two makes E4M3 values, or MXFP4 values
    (docs/numerics.md). A NaN or an infinity makes NaN of what its block or row reaches. Input, result and what is
    needed meanwhile are together at most twice the input for matrices of at least six blocks, less for float32, inside
    `jax.jit` too; NumPy arrays are taken to the device one expert at a time.

    Args:
      gate, up: bf16, f16, f32 or f64 [E, I, H], H and I multiples of 128 if not `pad`; with order="in_out" [E, H, I].
      down: the same types, [E, H, I]; with order="in_out" [E, I, H].
      order: "out_in" as PyTorch and checkpoints hold matrices, "in_out" as Flax and MaxText do. Where all three are in
        the other order they are those of a layer with H and I exchanged, and if H = I nothing can tell: say the order.
      format: one of the table. With mxfp4 the exponents of a row may spread over 26 binades: where the values can be
        looked at (not traced, and on this host), weights beyond that are an error, else such a row is NaN.
      gate_up_bias: the same types, [E, 2I], gate's and then up's, added before the activation; None for zeros, and
        with fp8_block, which holds no biases.
      down_bias: [E, H], added to an expert's result, which the routing weight multiplies; None likewise.
      pad: takes any H and I, with mxfp4 any multiples of 32, as gpt-oss' 2880. The arrays are those of the next
        multiples of 128, with zeros behind; `moe` pads x and cuts its result.
      num_experts: how many experts there are on all devices together, where the arrays hold a part of them, as inside
        `jax.shard_map`; None for those that the arrays hold. Copies of an expert count as experts of their own.
      progress: called with (experts done, E): after each expert of NumPy arrays, at the end for those of JAX.

    Raises:
      ShapeError, DTypeError: while tracing, for arguments that cannot be served.
      LayoutError: for weights that are packed already, an unknown order or format, biases with fp8_block.
      ShardingError: for arrays that are not split alike, over experts only, and for those in host memory.
      ArgumentError: for weights whose rows spread too far for mxfp4.
    """
    _check_progress(progress)
    gate, up, down = (_array(name, value) for name, value in (("gate", gate), ("up", up), ("down", down)))
    weight_checks.check_order(order)
    weight_checks.check_format(format)
    check_flag("pad", pad)
    weight_checks.check_floats(gate, up, down, order, format, bool(pad))
    num_held, *rest = gate.shape
    intermediate_size, hidden_size = rest if order == "out_in" else rest[::-1]
    biases = _biases(gate_up_bias, down_bias)
    weight_checks.check_biases(biases, num_held, hidden_size, intermediate_size, format)
    _check_split(gate=gate, up=up, down=down, **biases.given())
    num_experts = weight_checks.count_experts(num_held, num_experts)

    def quantize(first: int, *arrays: Array | None) -> ExpertWeights:
        leaves = quantize_and_pack(*arrays, order=order, format=format)
        if format == "mxfp4":
            weight_checks.check_spreads(leaves, intermediate_size, are_floats=True, first_expert=first)
        return _weights_of(leaves, format, hidden_size, intermediate_size)

    arrays = (gate, up, down, *biases)
    if num_held > 1 and all(isinstance(array, np.ndarray) for array in (gate, up, down)):
        parts = (
            quantize(expert, *(None if array is None else array[expert : expert + 1] for array in arrays))
            for expert in range(num_held)
        )
        weights = _fill(parts, num_held, "experts", progress)
    else:
        weights = quantize(0, *arrays)
        if progress is not None:
            progress(num_held, num_held)
    return dataclasses.replace(weights, num_experts=num_experts)


def pack_experts(
    gate_up: Array,
    gate_up_scale: Array,
    down: Array,
    down_scale: Array,
    *,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    pad: bool = False,
    num_experts: int | None = None,
) -> ExpertWeights:
    """Packs quantised weights as checkpoints hold them; nothing is rounded. H and I are multiples of 128 if not `pad`.

    The format follows from dtypes and shapes; both matrices have the same.

    | format      | gate_up (gate rows first), down         | gate_up_scale, down_scale                              |
    |-------------|-----------------------------------------|--------------------------------------------------------|
    | fp8_block   | f8e4m3fn [E, 2I, H], [E, H, I]          | f32, bf16, E8M0 [E, 2I/128, H/128], [E, H/128, I/128]  |
    | fp8_channel | f8e4m3fn [E, 2I, H], [E, H, I]          | f32, bf16 [E, 2I], [E, H], both also with 1 at the end |
    |             |                                         | one a matrix: [E], or [E, 2] of (gate, up); down's [E] |
    | mxfp4       | uint8, int8 [E, 2I, H/2], [E, H, I/2],  | E8M0 [E, 2I, H/32], [E, H, I/32]                       |
    |             | lower column in the low nibble, or      |                                                        |
    |             | float4_e2m1fn [E, 2I, H], [E, H, I]     |                                                        |

    E8M0 is float8_e8m0fnu, or its bytes in uint8: byte b is 2^(b - 127), and 255 is NaN. A value of the layer is weight
    * scale of its block, row, or 32 columns of a row. In a block of FP8, 255 makes NaN of what the block reaches. With
    mxfp4, 255 is refused, and so are rows whose exponents (of groups that are not zeros) spread over more than 26
    binades; where the values cannot be looked at, traced or on other hosts, such a row is NaN.

    Args:
      gate_up, gate_up_scale, down, down_scale: as in the table. Blocks at the end of sizes that are no multiples of 128
        are smaller; gate's are not shared with up.
      gate_up_bias, down_bias, pad, num_experts: as in `quantize_experts`.

    Raises:
      ShapeError, DTypeError: for arguments that cannot be served, while tracing; also for floats on this host that are
        E8M0 exponents after a cast: whole numbers of at least 64, not all powers of two.
      ArgumentError: for exponents of mxfp4 that cannot be served.
      LayoutError: for weights that are packed already, and biases with fp8_block.
      ShardingError: for arrays that are not split alike, over experts only, and for those in host memory.
    """
    check_flag("pad", pad)
    arrays = {"gate_up": gate_up, "gate_up_scale": gate_up_scale, "down": down, "down_scale": down_scale}
    quantized = Leaves(*(_array(name, value) for name, value in arrays.items()))
    format = weight_checks.find_format(quantized, bool(pad))
    num_held, hidden_size, _ = quantized.down.shape
    intermediate_size = quantized.gate_up.shape[1] // 2
    biases = _biases(gate_up_bias, down_bias)
    weight_checks.check_biases(biases, num_held, hidden_size, intermediate_size, format)
    _check_split(**quantized._asdict(), **biases.given())
    num_experts = weight_checks.count_experts(num_held, num_experts)
    leaves = pack_leaves(quantized, *biases, format=format)
    if format == "mxfp4":
        weight_checks.check_spreads(leaves, intermediate_size)
    weights = _weights_of(leaves, format, hidden_size, intermediate_size)
    return dataclasses.replace(weights, num_experts=num_experts)


def _biases(*values: object) -> Biases:
    named = zip(Biases._fields, values, strict=True)
    return Biases(*(None if value is None else _array(name, value) for name, value in named))


def _weights_of(leaves: Leaves, format: Format, hidden_size: int, intermediate_size: int) -> ExpertWeights:
    return ExpertWeights(
        *leaves,
        num_experts=leaves.down.shape[0],
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        layout=weight_layout.LAYOUT_TAGS[format],
    )


def stack_experts(
    weights: Iterable[ExpertWeights], *, num_layers: int | None = None, progress: Progress | None = None
) -> ExpertWeights:
    """Stacks the weights of equally shaped layers, for `moe(..., layer=i)`.

    Args:
      weights: the layers; any iterable.
      num_layers: how many there are. Given, each layer goes into its place of the result as it comes, so that with a
        generator little more than the result is in memory; else all layers are there beside it.
      progress: called with (layers done, num_layers) after each layer where `num_layers` is given.

    Raises `ShapeError` for layers of different shapes or another number of them, `LayoutError` for layers of different
    formats and for other things.
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


@functools.partial(jax.jit, static_argnames="format")
def pack_leaves(
    arrays: Leaves, gate_up_bias: jax.Array | None = None, down_bias: jax.Array | None = None, *, format: Format
) -> Leaves:
    """Packed leaves of arrays as checkpoints hold them."""
    hidden_size, intermediate_size = arrays.down.shape[1], arrays.gate_up.shape[1] // 2
    hidden, intermediate = map(weight_layout.padded_size, (hidden_size, intermediate_size))

    # `shared_columns`: how many columns of the matrix an element of the array stands for.
    def gate_up_tiles(array: jax.Array, shared_columns: int = 1) -> jax.Array:
        return pad_rows(pad_halves(array, 1, 2 * intermediate), 2, hidden // shared_columns)

    def down_tiles(array: jax.Array, shared_columns: int = 1) -> jax.Array:
        return pad_rows(pad_rows(array, 1, hidden), 2, intermediate // shared_columns)

    gate_up_bias, down_bias = pad_biases(gate_up_bias, down_bias, hidden, intermediate)
    if format == "mxfp4":
        gate_up, down = gate_up_tiles(_codes(arrays.gate_up), 2), down_tiles(_codes(arrays.down), 2)
        gate_up_e = gate_up_tiles(as_bytes(arrays.gate_up_scale), mxfp4.GROUP)
        down_e = down_tiles(as_bytes(arrays.down_scale), mxfp4.GROUP)
        gate_up_d, gate_up_scale = _stored_exponents(gate_up, gate_up_e)
        down_d, down_scale = _stored_exponents(down, down_e)
        return Leaves(
            mxfp4.pack_gate_up(gate_up, gate_up_d),
            weight_layout.pack_gate_up_row_scale(gate_up_scale, gate_up_bias),
            mxfp4.pack_down(down, down_d),
            weight_layout.pack_down_row_scale(down_scale, down_bias),
        )
    gate_up_scale, down_scale = (quantization.widen_scale(scale) for scale in (arrays.gate_up_scale, arrays.down_scale))
    if format == "fp8_channel":
        gate_up_scale = pad_halves(_repeat_for_rows(gate_up_scale, 2 * intermediate_size), 1, 2 * intermediate)
        down_scale = pad_rows(_repeat_for_rows(down_scale, hidden_size), 1, hidden)
        gate_up_scale = weight_layout.pack_gate_up_row_scale(gate_up_scale, gate_up_bias)
        down_scale = weight_layout.pack_down_row_scale(down_scale, down_bias)
    else:
        gate_up_scale = weight_layout.pack_gate_up_scale(gate_up_scale)
        down_scale = weight_layout.pack_down_scale(down_scale)
    return Leaves(
        weight_layout.pack_gate_up(gate_up_tiles(as_bytes(arrays.gate_up))),
        gate_up_scale,
        weight_layout.pack_down(down_tiles(as_bytes(arrays.down))),
        down_scale,
    )


def _codes(values: jax.Array) -> jax.Array:
    if values.dtype == jnp.float4_e2m1fn:
        return mxfp4.codes_of_float4(values)
    return jax.lax.bitcast_convert_type(values, jnp.uint8)


def _stored_exponents(codes: jax.Array, exponents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The exponents relative to their row's base, and the rows' scales."""
    base, scale = mxfp4.row_scales(exponents, mxfp4.are_zero_groups(codes))
    return exponents - base[..., None], scale


def _repeat_for_rows(scale: jax.Array, num_rows: int) -> jax.Array:
    """Scales [E, N], [E, N, 1], [E, 2] of gate and up, or [E] -> [E, N]."""
    num_scales = scale.shape[1] if scale.ndim > 1 else 1
    scale = weight_layout.reshape_trailing(scale, 1, num_scales, 1)
    scale = jnp.broadcast_to(scale, (scale.shape[0], num_scales, num_rows // num_scales))
    return weight_layout.reshape_trailing(scale, 1, num_rows)


def _fill(parts: Iterator[ExpertWeights], count: int, along: str, progress: Progress | None) -> ExpertWeights:
    """Joins `count` parts along "experts", of which each has one, or along "layers", a new dimension.

    Each is copied into the result as it comes and let go, so that there is never more than one beside the result.
    """
    result: ExpertWeights | None = None
    index, done = None, 0
    while (part := next(parts, None)) is not None:
        if done == count:  # there may be no end to them
            raise ShapeError(f"num_layers is {text_of(count)}, wanted more, as weights gave more: pass their number.")
        if result is None:
            result, index = _start(part, count=count, along=along)
        result, index = _put(result, part, index)
        # Else the queue of parts would grow as large as the result.
        jax.block_until_ready(result)
        del part
        done += 1
        if progress is not None:
            progress(done, count)
    if result is None or done != count:
        raise ShapeError(f"num_layers is {text_of(count)}, wanted {done}, as many as weights gave: pass their number.")
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
        updated = jax.lax.dynamic_update_index_in_dim(as_bytes(whole), as_bytes(part), index, 0)
        return jax.lax.bitcast_convert_type(updated, whole.dtype)

    return jax.tree.map(put, whole, part), index + 1


def _each_layer(weights: Iterable[ExpertWeights]) -> Iterator[ExpertWeights]:
    """Layers as they come, checked to be of one shape; holds none of them."""
    held = unwrap(weights)
    if isinstance(held, ExpertWeights) or not isinstance(held, Iterable):
        raise LayoutError(f"weights is {type_of(held)}, wanted the ExpertWeights of several layers: pass a sequence.")
    layers = iter(held)
    first_format, first_shape, first_shardings, first_devices = None, None, None, None
    for layer in itertools.count():
        try:
            one = unwrap(next(layers))
        except StopIteration:
            return
        if not isinstance(one, ExpertWeights):
            raise LayoutError(
                f"weights[{layer}] is {type_of(one)}, wanted ExpertWeights: "
                "make them with quantize_experts from float weights, pack_experts from quantised ones, or load_experts "
                "from files."
            )
        one = one.checked()
        for name, leaf in one.leaves._asdict().items():
            require_device_memory(f"weights[{layer}].{name}", leaf, f"weights[{layer}]")
        first_format = first_format or one.format
        if one.format != first_format:
            raise LayoutError(
                f"weights[{layer}] is {one.format}, wanted {first_format} like layer 0: stack layers of one format."
            )
        if one.is_stacked:
            raise ShapeError(f"weights[{layer}] is stacked already, wanted one layer: pass the layers one by one.")
        shape = (one.gate_up.shape, one.num_experts, one.hidden_size, one.intermediate_size)
        shardings = [jax.typeof(leaf).sharding for leaf in one.leaves]
        if first_shape is None:
            first_shape, first_shardings, first_devices = shape, shardings, devices_of(one.gate_up)
        if shape != first_shape:
            raise ShapeError(
                f"weights[{layer}] has (gate_up shape, E, H, I) {shape}, wanted {first_shape} like layer 0: "
                "stack layers of one shape."
            )
        if shardings != first_shardings or devices_of(one.gate_up) != first_devices:
            raise ShardingError(
                f"weights[{layer}].gate_up is {jax.typeof(one.gate_up)}, wanted all of it split like layer 0, over the "
                "same mesh: put the layers there with jax.device_put."
            )
        box = [one]
        del one
        yield box.pop()


def _check_split(**arrays: Array) -> None:
    """Raises `ShardingError` unless explicit types split all arrays over the same axes along the experts alone."""
    require_same_devices(arrays)
    first = next(iter(arrays))
    for name, array in arrays.items():
        require_split_of_leading(name, array, 1)
        require_same_split(name, array, first, arrays[first])


def _check_progress(progress: object) -> None:
    if progress is not None and not callable(progress):
        raise ArgumentError(
            f"progress is {text_of(progress)}, wanted a function of (done, of how many), or None: pass one."
        )


def _array(name: str, value: object) -> Array:
    held = unwrap(value)
    if isinstance(held, ExpertWeights):
        raise LayoutError(f"{name} is an ExpertWeights, wanted an array: it is packed already, pass it to moe.")
    array = as_array(name, held)
    require_device_memory(name, array)
    require_known_sizes(name, array)
    return array
