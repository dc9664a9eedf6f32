"""Checks of what weights are made of, by shapes and dtypes; of scales on the host, by values too."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import weight_layout
from jax_megamoe.arrays import Array
from jax_megamoe.errors import DTypeError, LayoutError, ShapeError

Order = Literal["out_in", "in_out"]

_FP8 = np.dtype(jnp.float8_e4m3fn)
_E8M0 = np.dtype(jnp.float8_e8m0fnu)
_DEQUANTIZE = "dequantise the weights, value * scale in float32, and pass them to quantize_experts"
# Layouts of (gate and up, down).
_LAYOUTS = {"out_in": ("[E, I, H]", "[E, H, I]"), "in_out": ("[E, H, I]", "[E, I, H]")}


def check_order(order: str) -> None:
    """Raises `LayoutError` unless it is one of `Order`."""
    if not isinstance(order, str) or order not in get_args(Order):
        raise LayoutError(f"order is {order!r}, wanted one of {get_args(Order)}: choose one.")


def check_floats(gate: Array, up: Array, down: Array, order: Order) -> None:
    """Raises for arguments of `quantize_experts` that it cannot take."""
    for name, array in (("gate", gate), ("up", up), ("down", down)):
        _check_float_dtype(name, array)
    of_gate, of_down = _LAYOUTS[order]
    num_experts, rows, columns = _require_rank("gate", gate.shape, of_gate)
    intermediate_size, hidden_size = (rows, columns) if order == "out_in" else (columns, rows)
    _require_multiples(hidden_size, intermediate_size)
    layout = f"with order={order!r} gate and up are {of_gate} and down is {of_down}"
    _require_shape("up", up.shape, (num_experts, rows, columns), f"{of_gate} like gate", layout)
    _require_shape("down", down.shape, (num_experts, columns, rows), of_down, layout)


def check_blocks(gate_up: Array, gate_up_scale: Array, down: Array, down_scale: Array) -> None:
    """Raises for arguments of `pack_experts` that it cannot take."""
    _check_fp8_dtypes(gate_up, down)
    for name, scale in (("gate_up_scale", gate_up_scale), ("down_scale", down_scale)):
        _check_scale_dtype(name, scale)
    e, h, i = _require_rank("down", down.shape, "[E, H, I]")
    _require_multiples(h, i)
    layout = "gate_up is [E, 2I, H], gate rows first, and down is [E, H, I]"
    _require_shape("gate_up", gate_up.shape, (e, 2 * i, h), "[E, 2I, H] for down's E, H, I", layout)
    _require_scale_shape("gate_up_scale", gate_up_scale.shape, (e, 2 * i, h), "[E, 2I/128, H/128]")
    _require_scale_shape("down_scale", down_scale.shape, (e, h, i), "[E, H/128, I/128]")
    for name, scale in (("gate_up_scale", gate_up_scale), ("down_scale", down_scale)):
        _refuse_exponents(name, scale)


def require_count(name: str, value: object) -> int:
    """The value as an int. Raises `ShapeError` unless it is a positive whole number."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value <= 0:
        raise ShapeError(f"{name} is {value!r}, wanted a positive int known while tracing: pass one.")
    return int(value)


def count_experts(num_held: int, num_experts: int | None) -> int:
    """How many experts there are, which an argument may say. Raises `ShapeError` for a number that cannot be."""
    if num_experts is None:
        return num_held
    if require_count("num_experts", num_experts) % num_held:
        raise ShapeError(
            f"num_experts is {num_experts}, wanted a multiple of {num_held}, the experts that the arrays hold: "
            "pass how many all devices hold together."
        )
    return int(num_experts)


def _check_float_dtype(name: str, array: Array) -> None:
    if jnp.issubdtype(array.dtype, jnp.floating) and jnp.dtype(array.dtype).itemsize >= 2:
        return
    advice = "FP8 blocks with their scales go to pack_experts" if array.dtype == _FP8 else _DEQUANTIZE
    raise DTypeError(f"{name} has dtype {array.dtype}, wanted bfloat16, float16, float32 or float64: {advice}.")


def _check_fp8_dtypes(gate_up: Array, down: Array) -> None:
    for name, array in (("gate_up", gate_up), ("down", down)):
        if array.dtype == _FP8:
            continue
        advice = _DEQUANTIZE
        if jnp.issubdtype(array.dtype, jnp.floating) and jnp.dtype(array.dtype).itemsize >= 2:
            advice = "float weights go to quantize_experts"
        elif array.dtype in (np.int8, np.uint8):
            # Two values in a byte halve the columns of both matrices.
            if gate_up.ndim == down.ndim == 3 and gate_up.shape[1:] == (2 * down.shape[2], down.shape[1]):
                advice = (
                    f"only if its bytes are those of float8_e4m3fn, {name}.view(jax.numpy.float8_e4m3fn) is meant; "
                    f"integers with scales are not: {_DEQUANTIZE}"
                )
            else:
                advice = f"packed 4-bit values are another format: {_DEQUANTIZE}"
        raise DTypeError(f"{name} has dtype {array.dtype}, wanted float8_e4m3fn: {advice}.")


def _check_scale_dtype(name: str, scale: Array) -> None:
    if scale.dtype in (jnp.float32, jnp.bfloat16, _E8M0, np.uint8):
        return
    if scale.dtype in (np.float16, np.float64):
        advice = "cast it to float32"
    elif scale.dtype == np.int8:
        advice = "if it holds the bytes of E8M0, pass them as uint8"
    elif jnp.issubdtype(scale.dtype, jnp.integer):
        advice = "pass one scale per block as the checkpoint holds it, not packed for another kernel"
    else:
        advice = _DEQUANTIZE
    raise DTypeError(
        f"{name} has dtype {scale.dtype}, wanted float32, bfloat16, or E8M0 as float8_e8m0fnu or its bytes in uint8: "
        f"{advice}."
    )


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
    if len(shape) == 4 and shape[-1] in (weight_layout.PLANE_BYTES, 2 * weight_layout.PLANE_BYTES):
        raise LayoutError(
            f"{name} has shape {shape}, wanted {wanted}: this is a packed leaf, unpack() the weights first."
        )
    if len(shape) != 3 or shape[0] == 0:
        raise ShapeError(f"{name} has shape {shape}, wanted {wanted}: pass the experts of one layer, at least one.")
    return shape[0], shape[1], shape[2]


def _require_multiples(hidden_size: int, intermediate_size: int) -> None:
    for name, size, what in (
        ("hidden size H", hidden_size, "the weights and the hidden states with zeros, and cut the result"),
        ("intermediate size I", intermediate_size, "the weights with zeros"),
    ):
        if size <= 0 or size % weight_layout.BLOCK:
            raise ShapeError(f"{name} is {size}, wanted a positive multiple of {weight_layout.BLOCK}: pad {what}.")


def _require_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...], meaning: str, layout: str) -> None:
    if tuple(shape) == wanted:
        return
    is_transposed = tuple(shape) == (wanted[0], wanted[2], wanted[1])
    advice = "swap its last two dimensions" if is_transposed else "pass matrices of one layer"
    raise ShapeError(f"{name} has shape {tuple(shape)}, wanted {wanted}, that is {meaning}: {layout}; {advice}.")


def _require_scale_shape(name: str, shape: tuple[int, ...], matrix: tuple[int, int, int], meaning: str) -> None:
    experts, rows, columns = matrix
    wanted = (experts, rows // weight_layout.BLOCK, columns // weight_layout.BLOCK)
    shape = tuple(shape)
    if shape == wanted:
        return
    if shape == (wanted[0], wanted[2], wanted[1]):
        advice = "swap its last two dimensions"
    elif shape in ((), (1,), (experts,), (experts, 1), (experts, 1, 1)):
        advice = "a scale for a whole matrix can be repeated for each of its blocks with numpy.broadcast_to"
    else:
        kind = "scales of rows" if shape in ((experts, rows), (experts, rows, 1)) else "scales of other blocks"
        advice = f"{kind} are another format, {_DEQUANTIZE}"
    raise ShapeError(f"{name} has shape {shape}, wanted {wanted}, that is {meaning}: {advice}.")
