"""Checks of what `moe` is called with, by shapes and dtypes only: they run while tracing."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import layout
from jax_megamoe.errors import DTypeError, LayoutError, MegaMoEError, ShapeError
from jax_megamoe.weights import ExpertWeights

MAX_TOP_K = 32
MAX_HIDDEN_SIZE = 65536


def check(
    x: jax.Array,
    weights: ExpertWeights,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    *,
    activation_clamp: float | None,
    routed_scaling_factor: float,
    layer: int | jax.Array | None,
) -> None:
    """Raises `ShapeError`, `DTypeError`, `LayoutError` or `MegaMoEError` for arguments that `moe` cannot take."""
    _check_weights(weights)
    _check_dtype("x", x, jnp.bfloat16)
    _check_dtype("topk_ids", topk_ids, jnp.int32)
    _check_dtype("topk_weights", topk_weights, jnp.float32)
    if x.ndim < 1 or x.shape[-1] != weights.hidden_size:
        raise ShapeError(
            f"x has shape {x.shape}, wanted [..., {weights.hidden_size}], the hidden size of the weights: "
            "pass the hidden states that these weights belong to."
        )
    if topk_ids.ndim != x.ndim or topk_ids.shape[:-1] != x.shape[:-1]:
        raise ShapeError(
            f"topk_ids has shape {topk_ids.shape}, wanted {_text(x.shape[:-1], 'k')} for x of shape {x.shape}: "
            "reshape it."
        )
    if not 1 <= topk_ids.shape[-1] <= MAX_TOP_K:
        raise ShapeError(
            f"topk_ids has shape {topk_ids.shape}, wanted 1 to {MAX_TOP_K} slots a token: choose another top_k."
        )
    if topk_weights.shape != topk_ids.shape:
        raise ShapeError(
            f"topk_weights has shape {topk_weights.shape}, wanted {topk_ids.shape} like topk_ids: reshape it."
        )
    _check_layer(layer, weights)
    if activation_clamp is not None and not (_is_number(activation_clamp) and activation_clamp > 0):
        raise MegaMoEError(
            f"activation_clamp is {activation_clamp}, wanted a positive number known while tracing: "
            "leave it out for no clamp."
        )
    if not _is_number(routed_scaling_factor) or not math.isfinite(routed_scaling_factor):
        raise MegaMoEError(
            f"routed_scaling_factor is {routed_scaling_factor}, wanted a finite number known while tracing: "
            "multiply topk_weights by what is computed."
        )


def _check_weights(weights: Any) -> None:
    if not isinstance(weights, ExpertWeights):
        raise LayoutError(
            f"weights is a {type(weights).__name__}, wanted ExpertWeights: "
            "make them with quantize_experts from float weights, or with pack_experts from FP8 blocks."
        )
    h, i, block = weights.hidden_size, weights.intermediate_size, layout.BLOCK
    tails = {
        "gate_up": (i // layout.PLANE_ROWS, h // block, 2 * layout.PLANE_BYTES),
        "gate_up_scale": (i // layout.PLANE_ROWS, h // block, 4),
        "down": (h // layout.PLANE_ROWS, i // block, layout.PLANE_BYTES),
        "down_scale": (h // layout.PLANE_ROWS, -(-i // (2 * block)), 4),
    }
    if h > MAX_HIDDEN_SIZE:
        raise ShapeError(f"weights have a hidden size of {h}, wanted at most {MAX_HIDDEN_SIZE}: use a smaller model.")
    lead = weights.gate_up.shape[:-3]
    for name, tail in tails.items():
        leaf = getattr(weights, name)
        _check_dtype(f"weights.{name}", leaf, jnp.float32 if name.endswith("scale") else jnp.float8_e4m3fn)
        if len(lead) not in (1, 2) or leaf.shape != (*lead, *tail):
            raise LayoutError(
                f"weights.{name} has shape {leaf.shape}, wanted {_text(('E', *tail))} or {_text(('L', 'E', *tail))} "
                f"with L and E as in weights.gate_up: make the weights anew with pack_experts."
            )
    if lead[:-1] == (0,):
        raise ShapeError("weights stack 0 layers, wanted at least one: pass those of stack_experts.")


def _check_layer(layer: Any, weights: ExpertWeights) -> None:
    if weights.is_stacked != (layer is not None):
        what, wanted = ("stacked", "an index") if weights.is_stacked else ("not stacked", "None")
        raise ShapeError(f"layer is {layer}, wanted {wanted}: the weights are {what}, as weights.gate_up.shape says.")
    if layer is None:
        return
    if isinstance(layer, int | np.integer) and not isinstance(layer, bool):
        num_layers = weights.gate_up.shape[0]
        if not 0 <= layer < num_layers:
            raise ShapeError(f"layer is {layer}, wanted 0 to {num_layers - 1}: the weights stack {num_layers} layers.")
        return
    if jnp.shape(layer) != ():
        raise ShapeError(f"layer has shape {jnp.shape(layer)}, wanted a scalar: call moe once for each layer.")
    _check_dtype("layer", layer, jnp.int32)


def _check_dtype(name: str, value: Any, wanted: Any) -> None:
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise DTypeError(
            f"{name} is a {type(value).__name__}, wanted an array of {jnp.dtype(wanted).name}: convert it with "
            "jax.numpy.asarray."
        )
    if value.dtype != wanted:
        raise DTypeError(
            f"{name} has dtype {value.dtype}, wanted {jnp.dtype(wanted).name}: "
            + ("make the weights anew with pack_experts." if name.startswith("weights.") else "cast it.")
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _text(shape: tuple[Any, ...], *more: Any) -> str:
    return f"[{', '.join(str(size) for size in (*shape, *more))}]"
