"""Checks of what `moe` is called with, by shapes and dtypes only: they run while tracing."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe.activations import Activation, as_numbers
from jax_megamoe.arrays import (
    MAX_FLOAT32,
    Array,
    as_array,
    as_float,
    clamp_to_int32,
    require_known_sizes,
    require_same_devices,
    text_of,
    type_of,
    unwrap,
)
from jax_megamoe.errors import ArgumentError, DTypeError, LayoutError, ShapeError
from jax_megamoe.weights import ExpertWeights

MAX_TOP_K = 32
MAX_HIDDEN_SIZE = 65536


class Arguments(NamedTuple):
    """What a call of `moe` goes on with: arrays out of their boxes, those of NumPy as they are, and plain numbers."""

    x: jax.Array
    weights: ExpertWeights
    topk_ids: jax.Array
    topk_weights: jax.Array
    layer: jax.Array  # int32[]; may be outside of [0, L), which the kernel and the reference clamp
    num_valid_tokens: jax.Array | None  # int32[]; may be outside of [0, T]
    activation: Activation
    routed_scaling_factor: float


def check(
    x: Any,
    weights: Any,
    topk_ids: Any,
    topk_weights: Any,
    *,
    activation: object,
    activation_clamp: object,
    routed_scaling_factor: object,
    layer: Any,
    num_valid_tokens: Any,
) -> Arguments:
    """The arguments that `moe` goes on with.

    Raises `ShapeError`, `DTypeError`, `LayoutError`, `ShardingError` or `ArgumentError` for arguments that `moe` cannot
    take.
    """
    weights = check_weights(unwrap(weights))
    x = as_array("x", x, "an array of bfloat16")
    topk_ids = as_array("topk_ids", topk_ids, "an array of int32")
    topk_weights = as_array("topk_weights", topk_weights, "an array of float32")
    for name, array in (("x", x), ("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        require_known_sizes(name, array)
    _check_dtypes(x, topk_ids, topk_weights)
    if x.ndim < 1 or x.shape[-1] != weights.hidden_size:
        is_transposed = x.ndim > 0 and x.shape[-1] == weights.intermediate_size
        raise ShapeError(
            f"x has shape {x.shape}, wanted [..., {weights.hidden_size}], the hidden size of the weights: "
            + (
                "if all their matrices were passed transposed, make the weights with "
                'quantize_experts(..., order="in_out").'
                if is_transposed
                else "pass the hidden states that these weights belong to."
            )
        )
    if math.prod(x.shape[:-1]) >= 1 << 31:
        raise ShapeError(f"x has shape {x.shape}, wanted fewer than 2^31 tokens: pass fewer at a time.")
    if topk_ids.ndim != x.ndim or topk_ids.shape[:-1] != x.shape[:-1]:
        raise ShapeError(
            f"topk_ids has shape {topk_ids.shape}, wanted {_text(x.shape[:-1], 'k')} for x of shape {x.shape}: "
            "reshape it."
        )
    if not 1 <= topk_ids.shape[-1] <= MAX_TOP_K:
        raise ShapeError(
            f"topk_ids has shape {topk_ids.shape}, wanted 1 to {MAX_TOP_K} slots a token: choose another top_k."
        )
    if topk_ids.size >= 1 << 31:
        raise ShapeError(
            f"topk_ids has shape {topk_ids.shape}, wanted fewer than 2^31 slots: pass fewer tokens at a time."
        )
    if topk_weights.shape != topk_ids.shape:
        raise ShapeError(
            f"topk_weights has shape {topk_weights.shape}, wanted {topk_ids.shape} like topk_ids: reshape it."
        )
    clamp = math.inf if activation_clamp is None else as_float(activation_clamp)
    if not np.float32(clamp) > 0:
        raise ArgumentError(
            f"activation_clamp is {text_of(activation_clamp)}, wanted a positive FP32 number known while tracing: "
            "pass a number of Python or NumPy, or leave it out for no clamp."
        )
    numbers = as_numbers(activation, clamp)
    factor = as_float(routed_scaling_factor)
    if not abs(factor) <= MAX_FLOAT32:
        raise ArgumentError(
            f"routed_scaling_factor is {text_of(routed_scaling_factor)}, "
            "wanted a finite FP32 number known while tracing: "
            "multiply topk_weights by what is computed."
        )
    number = _check_layer(layer, weights)
    num_valid = _check_num_valid_tokens(num_valid_tokens, math.prod(x.shape[:-1]))
    scalars = {"layer": number, "num_valid_tokens": num_valid}
    require_same_devices({"x": x, "weights.gate_up": weights.gate_up, **scalars})
    if isinstance(number, int):
        number = place_number(number, x, weights.gate_up)
    if isinstance(num_valid, int):
        num_valid = place_number(num_valid, x, weights.gate_up)
    return Arguments(x, weights, topk_ids, topk_weights, number, num_valid, numbers, factor)


def check_weights(weights: object, name: str = "weights") -> ExpertWeights:
    """The weights with their leaves out of boxes, if they have any. `name`: of the argument."""
    if not isinstance(weights, ExpertWeights):
        layers = [unwrap(element) for element in weights] if isinstance(weights, list | tuple) else []
        if layers and all(isinstance(element, ExpertWeights) for element in layers):
            remedy = "pass one, or all of them through stack_experts and which one as layer."
        else:
            remedy = (
                "make them with quantize_experts from float weights, pack_experts from quantised ones, or load_experts "
                "from files."
            )
        raise LayoutError(f"{name} is {type_of(weights)}, wanted ExpertWeights: {remedy}")
    if weights.hidden_size > MAX_HIDDEN_SIZE:
        raise ShapeError(
            f"weights have a hidden size of {text_of(weights.hidden_size)}, wanted at most {MAX_HIDDEN_SIZE}: "
            "use a smaller model."
        )
    weights = weights.checked()
    if weights.num_layers == 0:
        raise ShapeError("weights stack 0 layers, wanted at least one: pass those of stack_experts.")
    return weights


def _check_dtypes(x: Array, topk_ids: Array, topk_weights: Array) -> None:
    if x.dtype != jnp.bfloat16:
        is_wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1
        remedy = "cast it" if is_wide else "pass the hidden states, not quantised"
        raise DTypeError(f"x has dtype {x.dtype}, wanted bfloat16: {remedy}.")
    if jnp.issubdtype(topk_ids.dtype, jnp.floating) and jnp.issubdtype(topk_weights.dtype, jnp.integer):
        raise DTypeError(
            f"topk_ids has dtype {topk_ids.dtype} and topk_weights {topk_weights.dtype}, wanted int32 and float32: "
            "they are swapped, pass the ids first."
        )
    if topk_ids.dtype != jnp.int32:
        if not jnp.issubdtype(topk_ids.dtype, jnp.integer):
            remedy = "pass the ids of experts, whole numbers"
        elif jnp.iinfo(topk_ids.dtype).max > jnp.iinfo(jnp.int32).max:
            # A cast drops the upper bits, and may make the id of an expert of what is none.
            remedy = "cast it, with -1 for ids that are beyond int32, if there are any"
        else:
            remedy = "cast it"
        raise DTypeError(f"topk_ids has dtype {topk_ids.dtype}, wanted int32: {remedy}.")
    if topk_weights.dtype != jnp.float32:
        is_real = jnp.issubdtype(topk_weights.dtype, jnp.floating) or jnp.issubdtype(topk_weights.dtype, jnp.integer)
        remedy = "cast it" if is_real else "pass the routing weights"
        raise DTypeError(f"topk_weights has dtype {topk_weights.dtype}, wanted float32: {remedy}.")


def _check_layer(layer: object, weights: ExpertWeights) -> int | jax.Array:
    if weights.is_stacked != (layer is not None):
        what, wanted = ("stacked", "an index") if weights.is_stacked else ("not stacked", "None")
        raise ShapeError(
            f"layer is {text_of(layer)}, wanted {wanted}: the weights are {what}, as weights.gate_up.shape says."
        )
    if layer is None:
        return 0
    number = as_number("layer", layer, "call moe once for each layer", "pass a layer's number")
    num_layers = weights.gate_up.shape[0]
    if isinstance(number, int) and not 0 <= number < num_layers:
        raise ShapeError(
            f"layer is {text_of(number)}, wanted 0 to {num_layers - 1}: the weights stack {num_layers} layers."
        )
    return number


def _check_num_valid_tokens(num_valid_tokens: object, num_tokens: int) -> int | jax.Array | None:
    if num_valid_tokens is None:
        return None
    number = as_number(
        "num_valid_tokens",
        num_valid_tokens,
        "pass how many of all tokens together are valid",
        "pass how many tokens are valid",
    )
    if isinstance(number, int) and not 0 <= number <= num_tokens:
        raise ShapeError(
            f"num_valid_tokens is {text_of(number)}, wanted 0 to {num_tokens}, the tokens of x: "
            "pass how many of them are valid."
        )
    return number


def as_number(name: str, value: object, scalar_remedy: str, integer_remedy: str) -> int | jax.Array:
    """An integer that may be traced: an int, of Python or NumPy, as it is, and a jax array as int32[].

    A value beyond int32 becomes the nearest one that is not. Raises `ShapeError` for another shape than [],
    `DTypeError` for what is no integer; the remedies say what to do.
    """
    held = unwrap(value)
    number = held if isinstance(held, int) else as_array(name, held)
    if isinstance(number, bool):
        raise DTypeError(f"{name} is {number}, wanted an integer type: {integer_remedy}.")
    if isinstance(number, int):
        return number
    if number.shape != ():
        raise ShapeError(f"{name} has shape {number.shape}, wanted a scalar: {scalar_remedy}.")
    if not jnp.issubdtype(number.dtype, jnp.integer):
        raise DTypeError(f"{name} has dtype {number.dtype}, wanted an integer type: {integer_remedy}.")
    if isinstance(number, jax.Array):
        return number if number.dtype == jnp.int32 else _clamp_to_int32(number)
    return int(number)


def place_number(number: int, *arrays: Array) -> jax.Array:
    """int32[] where the arrays are; from elsewhere it would be moved, which jax.transfer_guard may forbid."""
    for array in arrays:
        if isinstance(array, jax.core.Tracer) or (isinstance(array, jax.Array) and len(array.sharding.device_set) > 1):
            beside: jax.Array = _constant_beside(array, number=number)
            return beside
    # By itself a transfer that the guard counts as meant.
    return jnp.asarray(jax.device_put(np.int32(number)))


@functools.partial(jax.jit, static_argnames="number", keep_unused=True, inline=True)
def _constant_beside(_: jax.Array, *, number: int) -> jax.Array:
    return jnp.asarray(number, jnp.int32)


# int32[] that is inside or outside of [0, L) like the layer, also of types that hold more. Compiled: its constants
# would be transfers.
_clamp_to_int32 = jax.jit(clamp_to_int32)


def _text(shape: tuple[Any, ...], *more: Any) -> str:
    return f"[{', '.join(str(size) for size in (*shape, *more))}]"
