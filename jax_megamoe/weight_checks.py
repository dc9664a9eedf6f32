"""Checks of what weights are made of, by shapes and dtypes; of scales on the host, by values too."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import mxfp4, weight_layout
from jax_megamoe.arrays import Array, text_of
from jax_megamoe.errors import ArgumentError, DTypeError, LayoutError, ShapeError
from jax_megamoe.operands import Leaves
from jax_megamoe.weight_layout import Format

Order = Literal["out_in", "in_out"]

_FP8 = np.dtype(jnp.float8_e4m3fn)
_E8M0 = np.dtype(jnp.float8_e8m0fnu)
_E2M1 = np.dtype(jnp.float4_e2m1fn)
_BYTES = (np.dtype(np.uint8), np.dtype(np.int8))
_DEQUANTIZE = "dequantise the weights, value * scale in float32, and pass them to quantize_experts"
# Layouts of (gate and up, down).
_LAYOUTS = {"out_in": ("[E, I, H]", "[E, H, I]"), "in_out": ("[E, H, I]", "[E, I, H]")}


class Biases(NamedTuple):
    """Arguments of `quantize_experts` and `pack_experts`."""

    gate_up_bias: Array | None
    down_bias: Array | None

    def given(self) -> dict[str, Array]:
        """Those that there are, by name."""
        return {name: bias for name, bias in self._asdict().items() if bias is not None}


_MOST_SIZE = 1 << 29  # rows of gate and up together, and offsets into them, are int32


def check_order(order: str) -> None:
    """Raises `LayoutError` unless it is one of `Order`."""
    if not isinstance(order, str) or order not in get_args(Order):
        raise LayoutError(f"order is {text_of(order)}, wanted one of {get_args(Order)}: choose one.")


def check_format(format: str) -> None:
    """Raises `LayoutError` unless it is one of `Format`."""
    if not isinstance(format, str) or format not in get_args(Format):
        raise LayoutError(f"format is {text_of(format)}, wanted one of {get_args(Format)}: choose one.")


def check_floats(gate: Array, up: Array, down: Array, order: Order, format: Format, pad: bool) -> None:
    """Raises for arguments of `quantize_experts` that it cannot take."""
    for name, array in (("gate", gate), ("up", up), ("down", down)):
        _check_float_dtype(name, array)
    of_gate, of_down = _LAYOUTS[order]
    num_experts, rows, columns = _require_rank("gate", gate.shape, of_gate)
    intermediate_size, hidden_size = (rows, columns) if order == "out_in" else (columns, rows)
    _require_multiples(hidden_size, intermediate_size, pad, format == "mxfp4")
    layout = f"with order={order!r} gate and up are {of_gate} and down is {of_down}"
    _require_shape("up", up.shape, (num_experts, rows, columns), f"{of_gate} like gate", layout)
    _require_shape("down", down.shape, (num_experts, columns, rows), of_down, layout)


def find_format(arrays: Leaves, pad: bool) -> Format:
    """The format of the arguments of `pack_experts`. Raises for those that it cannot take."""
    e, h, down_columns = _require_rank("down", arrays.down.shape, "[E, H, I], or [E, H, I/2] of packed mxfp4")
    is_mxfp4 = [_is_mxfp4(name, arrays) for name in ("gate_up", "down")]
    if is_mxfp4[0] != is_mxfp4[1]:
        raise DTypeError(
            f"gate_up has dtype {arrays.gate_up.dtype} and down {arrays.down.dtype}, wanted one format, FP8 or mxfp4, "
            f"for both: {_DEQUANTIZE}."
        )
    per_element = [2 if array.dtype in _BYTES else 1 for array in (arrays.gate_up, arrays.down)]
    i = down_columns * per_element[1]
    _require_multiples(h, i, pad, is_mxfp4[0])
    of_gate_up = "[E, 2I, H/2]" if per_element[0] == 2 else "[E, 2I, H]"
    of_down = "[E, H, I/2]" if per_element[1] == 2 else "[E, H, I]"
    layout = f"gate_up is {of_gate_up}, gate rows first, and down is {of_down}"
    wanted = (e, 2 * i, h // per_element[0])
    _require_shape("gate_up", arrays.gate_up.shape, wanted, f"{of_gate_up} for down's E, H, I", layout)
    matrices = {"gate_up_scale": (e, 2 * i, h), "down_scale": (e, h, i)}
    if is_mxfp4[0]:
        for name, matrix in matrices.items():
            _check_exponents(name, getattr(arrays, name), matrix)
        return "mxfp4"
    formats = {name: _scale_format(name, getattr(arrays, name), matrix) for name, matrix in matrices.items()}
    if formats["gate_up_scale"] != formats["down_scale"]:
        text = " and ".join(f"{name} has shape {getattr(arrays, name).shape}, of {f}" for name, f in formats.items())
        raise ShapeError(f"{text}, wanted one format: {_DEQUANTIZE}.")
    for name in matrices:
        _refuse_exponents(name, getattr(arrays, name))
    return formats["down_scale"]


def check_biases(biases: Biases, num_experts: int, hidden_size: int, intermediate_size: int, format: Format) -> None:
    """Raises for biases that weights of these sizes and this format cannot have."""
    wanted = {"gate_up_bias": (num_experts, 2 * intermediate_size), "down_bias": (num_experts, hidden_size)}
    for name, bias in biases.given().items():
        shape = wanted[name]
        if format == "fp8_block":
            raise LayoutError(f"{name} is given, wanted None: fp8_block holds no biases, choose fp8_channel or mxfp4.")
        if not jnp.issubdtype(bias.dtype, jnp.floating) or jnp.dtype(bias.dtype).itemsize < 2:
            raise DTypeError(f"{name} has dtype {bias.dtype}, wanted bfloat16, float16, float32 or float64: cast it.")
        if tuple(bias.shape) != shape:
            meaning = "[E, 2I], those of gate first" if name == "gate_up_bias" else "[E, H]"
            raise ShapeError(f"{name} has shape {tuple(bias.shape)}, wanted {shape}, that is {meaning}: reshape it.")


def check_spreads(packed: Leaves, intermediate_size: int, *, are_floats: bool = False, first_expert: int = 0) -> None:
    """Raises `ArgumentError` for exponents that mxfp4 cannot serve, as far as the packed leaves can be looked at.

    Packing makes NaN of the scales of such rows; only what they are made of is read here. `are_floats`: of weights that
    were quantised, whose NaN may stay; `first_expert` is the number of their first.
    """
    for name in ("gate_up", "down"):
        for expert, scale, planes in _nan_experts(getattr(packed, name), getattr(packed, f"{name}_scale")):
            # On the way to an error, which a guard that the caller has set should not hide.
            with jax.transfer_guard("allow"):
                codes, e = (mxfp4.unpack_gate_up if name == "gate_up" else mxfp4.unpack_down)(planes)
                row_scale = getattr(weight_layout, f"unpack_{name}_row_scale")(scale)
                is_zero = np.asarray(mxfp4.are_zero_groups(codes))
            for row in np.flatnonzero(np.isnan(row_scale)):
                exponents = np.asarray(e)[row]
                where = _row_text(name, first_expert + expert, int(row), intermediate_size, are_floats)
                if (exponents == mxfp4.NAN_EXPONENT).any():
                    if are_floats:
                        continue
                    raise ArgumentError(
                        f"{where} has an E8M0 exponent of {mxfp4.NAN_EXPONENT}, which is NaN, wanted 0 to 254 for "
                        "mxfp4: mend the checkpoint."
                    )
                used = exponents[~is_zero[row]]
                raise ArgumentError(
                    f"{where} has E8M0 exponents from {used.min()} to {used.max()}, wanted at most {mxfp4.SPREAD} "
                    "between the smallest and the largest for mxfp4: make zeros of the groups that are too small to "
                    "matter."
                )


def _row_text(name: str, expert: int, row: int, intermediate_size: int, are_floats: bool) -> str:
    if name == "gate_up":
        # In the leaf, up begins behind gate's padding.
        is_up, row = divmod(row, weight_layout.padded_size(intermediate_size))
        if are_floats:
            name = "up" if is_up else "gate"
        elif is_up:
            row += intermediate_size
    return f"row {row} of expert {expert} of {name}"


def _nan_experts(planes: jax.Array, scale: jax.Array) -> Iterator[tuple[int, Any, Any]]:
    """Number, scales and planes of each expert with a row of scale NaN; none where values cannot be looked at."""
    if isinstance(scale, jax.core.Tracer) or not scale.is_fully_addressable:
        return
    # By shards: indexing would be a computation on all devices.
    planes_of = {shard.device: shard.data for shard in planes.addressable_shards}
    for shard in scale.addressable_shards:
        scales = np.asarray(jax.device_get(shard.data))
        for local in np.flatnonzero(np.isnan(scales).any((1, 2, 3))):
            held = jax.device_get(planes_of[shard.device])
            yield (shard.index[0].start or 0) + int(local), scales[local], np.asarray(held)[local]


def require_count(name: str, value: object) -> int:
    """The value as an int. Raises `ShapeError` unless it is a positive whole number, and no more than int32 holds."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 < int(value) < 1 << 31:
        raise ShapeError(f"{name} is {text_of(value)}, wanted a positive int32 known while tracing: pass one.")
    return int(value)


def count_experts(num_held: int, num_experts: int | None) -> int:
    """How many experts there are, which an argument may say. Raises `ShapeError` for a number that cannot be."""
    if num_experts is None:
        return num_held
    if require_count("num_experts", num_experts) % num_held:
        raise ShapeError(
            f"num_experts is {text_of(num_experts)}, "
            f"wanted a multiple of {num_held}, the experts that the arrays hold: "
            "pass how many all devices hold together."
        )
    return int(num_experts)


def _check_float_dtype(name: str, array: Array) -> None:
    if jnp.issubdtype(array.dtype, jnp.floating) and jnp.dtype(array.dtype).itemsize >= 2:
        return
    advice = _DEQUANTIZE
    if array.dtype in (_FP8, _E2M1):
        advice = "FP8 and MXFP4 weights with their scales go to pack_experts"
    raise DTypeError(f"{name} has dtype {array.dtype}, wanted bfloat16, float16, float32 or float64: {advice}.")


def _is_mxfp4(name: str, arrays: Leaves) -> bool:
    """Whether a matrix is of mxfp4 and not of FP8. Raises `DTypeError` for one that is neither."""
    array = getattr(arrays, name)
    if array.dtype in (_FP8, _E2M1):
        return bool(array.dtype == _E2M1)
    advice = _DEQUANTIZE
    if array.dtype in _BYTES:
        shapes = arrays.gate_up.shape, arrays.down.shape
        # The columns of MXFP4 are halved in both matrices, so that it never looks like this.
        if not (len(shapes[0]) == len(shapes[1]) == 3 and shapes[0][1:] == (2 * shapes[1][2], shapes[1][1])):
            return True
        advice = (
            f"only if its bytes are those of float8_e4m3fn, {name}.view(jax.numpy.float8_e4m3fn) is meant; "
            f"mxfp4 has two values in a byte, and integers with scales are not served: {_DEQUANTIZE}"
        )
    elif jnp.issubdtype(array.dtype, jnp.floating) and jnp.dtype(array.dtype).itemsize >= 2:
        advice = "float weights go to quantize_experts"
    raise DTypeError(
        f"{name} has dtype {array.dtype}, wanted float8_e4m3fn, or mxfp4 as uint8, int8 or float4_e2m1fn: {advice}."
    )


def _check_exponents(name: str, scale: Array, matrix: tuple[int, int, int]) -> None:
    """Raises unless it is the scale of a matrix of mxfp4."""
    if scale.dtype not in (_E8M0, np.uint8):
        if scale.dtype == np.int8:
            advice = "if it holds the bytes of E8M0, pass them as uint8"
        elif scale.dtype == _FP8:
            advice = f"scales of E4M3 (NVFP4) are another format, {_DEQUANTIZE}"
        else:
            advice = f"pass the exponents as the checkpoint holds them, or {_DEQUANTIZE}"
        raise DTypeError(
            f"{name} has dtype {scale.dtype}, wanted E8M0 for mxfp4, as float8_e8m0fnu or its bytes in uint8: {advice}."
        )
    experts, rows, columns = matrix
    wanted, shape = (experts, rows, columns // mxfp4.GROUP), tuple(scale.shape)
    if shape == wanted:
        return
    meaning = "[E, 2I, H/32]" if name == "gate_up_scale" else "[E, H, I/32]"
    is_transposed = shape == (wanted[0], wanted[2], wanted[1])
    advice = (
        "swap its last two dimensions" if is_transposed else f"scales of other groups are another format, {_DEQUANTIZE}"
    )
    raise ShapeError(f"{name} has shape {shape}, wanted {wanted}, that is {meaning} of mxfp4: {advice}.")


def _scale_format(name: str, scale: Array, matrix: tuple[int, int, int]) -> Format:
    """The format that the scale of a matrix of FP8 belongs to. Raises for one of neither."""
    experts, rows, columns = matrix
    # Of gate and up, a block has rows of one of them only.
    parts = 2 if name == "gate_up_scale" else 1
    of_blocks = (experts, parts * _count_blocks(rows // parts), _count_blocks(columns))
    of_rows = [(experts, rows), (experts, rows, 1), (experts,)]
    if name == "gate_up_scale":
        of_rows.append((experts, 2))
    shape = tuple(scale.shape)
    # Only for matrices of one row or column two of them are equal.
    if shape == of_blocks or shape in of_rows:
        format: Format = "fp8_block" if shape == of_blocks else "fp8_channel"
        _check_scale_dtype(name, scale, format)
        return format
    # Another type says more than the shape of what it packs.
    _check_scale_dtype(name, scale, "fp8_block")
    if shape == (of_blocks[0], of_blocks[2], of_blocks[1]):
        advice = "swap its last two dimensions"
    elif shape in ((), (1,), (experts, 1), (experts, 1, 1)):
        advice = "for a scale of a whole matrix pass one for each expert, [E]"
    else:
        advice = f"scales of other blocks are another format, {_DEQUANTIZE}"
    is_gate_up = name == "gate_up_scale"
    raise ShapeError(
        f"{name} has shape {shape}, wanted {of_blocks}, that is "
        f"{'[E, 2I/128, H/128]' if is_gate_up else '[E, H/128, I/128]'} of fp8_block, or "
        f"{'[E, 2I], [E, 2I, 1], [E, 2]' if is_gate_up else '[E, H], [E, H, 1]'} or [E] of fp8_channel: {advice}."
    )


def _check_scale_dtype(name: str, scale: Array, format: Format) -> None:
    is_e8m0 = scale.dtype in (_E8M0, np.uint8)
    if scale.dtype in (jnp.float32, jnp.bfloat16) or (is_e8m0 and format == "fp8_block"):
        return
    if scale.dtype in (np.float16, np.float64):
        advice = "cast it to float32"
    elif is_e8m0:
        advice = "pass the powers of two, 2^(byte - 127), in float32"
    elif scale.dtype == np.int8:
        advice = "if it holds the bytes of E8M0, pass them as uint8"
    elif jnp.issubdtype(scale.dtype, jnp.integer):
        advice = "pass the scales as the checkpoint holds them, not packed for another kernel"
    else:
        advice = _DEQUANTIZE
    wanted = "float32, bfloat16, or E8M0 as float8_e8m0fnu or its bytes in uint8"
    if format == "fp8_channel":
        wanted = "float32 or bfloat16"
    raise DTypeError(f"{name} has dtype {scale.dtype}, wanted {wanted} for {format}: {advice}.")


def _refuse_exponents(name: str, scale: Array) -> None:
    """Raises for scales that look like bytes of E8M0 cast to floats: whole numbers, too large for what scales are."""
    if scale.dtype not in (jnp.float32, jnp.bfloat16) or isinstance(scale, jax.core.Tracer):
        return
    if isinstance(scale, jax.Array) and not scale.is_fully_addressable:
        return
    values = np.asarray(jax.device_get(scale)).astype(np.float32)
    in_range = (values == 0) | ((values >= 64) & (values <= 255) & (values == np.round(values)))
    # Powers of two alone may be meant.
    if in_range.all() and (np.frexp(values)[0] > 0.5).any():
        raise DTypeError(
            f"{name} holds whole numbers from {values.min():.0f} to {values.max():.0f}, as E8M0 exponents become when "
            "they are cast to floats, wanted scales: pass the exponents as float8_e8m0fnu, or as uint8."
        )


def _require_rank(name: str, shape: tuple[int, ...], wanted: str) -> tuple[int, int, int]:
    planes = (weight_layout.PLANE_BYTES, weight_layout.MXFP4_PLANE_BYTES)
    if len(shape) == 4 and shape[-1] in [count * plane for count in (1, 2) for plane in planes]:
        raise LayoutError(
            f"{name} has shape {shape}, wanted {wanted}: this is a packed leaf, unpack() the weights first."
        )
    if len(shape) != 3 or shape[0] == 0:
        raise ShapeError(f"{name} has shape {shape}, wanted {wanted}: pass the experts of one layer, at least one.")
    return shape[0], shape[1], shape[2]


def _count_blocks(size: int) -> int:
    return weight_layout.padded_size(size) // weight_layout.BLOCK


def _require_multiples(hidden_size: int, intermediate_size: int, pad: bool, is_mxfp4: bool) -> None:
    least = mxfp4.GROUP if is_mxfp4 else 1  # of what can be padded
    unit = least if pad else weight_layout.BLOCK
    for name, size in (("hidden size H", hidden_size), ("intermediate size I", intermediate_size)):
        if size > _MOST_SIZE:
            raise ShapeError(
                f"{name} is {size}, wanted at most 2^29: split the layer over devices, with jax.shard_map."
            )
        if size > 0 and size % unit == 0:
            continue
        wanted = f"positive multiple of {unit}" if unit > 1 else "positive size"
        remedy = "pass pad=True, which pads with zeros" if size % least == 0 else "pad the weights with zeros"
        raise ShapeError(
            f"{name} is {size}, wanted a {wanted}: {remedy if size > 0 else 'pass the weights of a layer'}."
        )


def _require_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...], meaning: str, layout: str) -> None:
    if tuple(shape) == wanted:
        return
    is_transposed = tuple(shape) == (wanted[0], wanted[2], wanted[1])
    advice = "swap its last two dimensions" if is_transposed else "pass matrices of one layer"
    raise ShapeError(f"{name} has shape {tuple(shape)}, wanted {wanted}, that is {meaning}: {layout}; {advice}.")
