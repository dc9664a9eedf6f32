"""Router scores -> the experts of each token and their weights. A convenience: `moe` takes any router's results."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe.errors import DTypeError, MegaMoEError, ShapeError

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]


def route(
    logits: jax.Array | np.ndarray,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    bias: jax.Array | np.ndarray | None = None,
    num_groups: int = 1,
    top_groups: int | None = None,
    renormalize: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Selects `top_k` experts per token: logits float [..., E] -> ids int32[..., k], weights f32[..., k].

    The experts come in the order of descending score, of equal scores the lower id first.

    Args:
      logits: the router's output; computed with in FP32.
      top_k: experts per token.
      scoring: what turns logits into scores: "softmax" over all experts, "sigmoid", or "sqrtsoftplus",
        sqrt(log(1 + exp(logit))).
      bias: f32[E], added to the scores for the selection only, never to the weights.
      num_groups: the experts form this many groups of consecutive ids.
      top_groups: selects only among this many groups, those whose two best (biased) scores have the largest sum;
        None means all groups.
      renormalize: divides the selected scores by their sum. No scaling factor is applied here; `moe` takes one.

    Raises:
      ShapeError, DTypeError: for arguments of the wrong shape or dtype, or numbers that do not fit each other.
      MegaMoEError: for an unknown `scoring`.
    """
    if logits.ndim == 0:
        raise ShapeError("logits is a scalar, wanted [..., E]: pass one score per expert.")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise DTypeError(f"logits has dtype {logits.dtype}, wanted a floating-point type: cast it.")
    num_experts = logits.shape[-1]
    top_groups = num_groups if top_groups is None else top_groups
    if num_groups < 1 or num_experts % num_groups:
        raise ShapeError(f"num_groups is {num_groups}, wanted a divisor of {num_experts} experts: choose another.")
    if not 1 <= top_groups <= num_groups:
        raise ShapeError(f"top_groups is {top_groups}, wanted 1 to num_groups = {num_groups}: choose another.")
    group_size = num_experts // num_groups
    if not 1 <= top_k <= top_groups * group_size:
        raise ShapeError(
            f"top_k is {top_k}, wanted 1 to {top_groups * group_size}, the experts to select from: choose another."
        )
    if bias is not None and bias.shape != (num_experts,):
        raise ShapeError(f"bias has shape {bias.shape}, wanted ({num_experts},): pass one value per expert.")

    scores = _score(jnp.asarray(logits, jnp.float32), scoring)
    selection = scores if bias is None else scores + jnp.asarray(bias, jnp.float32)
    if top_groups < num_groups:
        selection = _mask_groups(selection, num_groups, top_groups)
    # top_k puts the lower index first among equals.
    ids = jax.lax.top_k(selection, top_k)[1]
    probs = jnp.take_along_axis(scores, ids, axis=-1)
    if renormalize:
        # All selected scores may be zero: sigmoid underflows.
        probs = probs / jnp.maximum(jnp.sum(probs, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return ids.astype(jnp.int32), probs


def _score(logits: jax.Array, scoring: Scoring) -> jax.Array:
    match scoring:
        case "softmax":
            return jax.nn.softmax(logits, axis=-1)
        case "sigmoid":
            return jax.nn.sigmoid(logits)
        case "sqrtsoftplus":
            return jnp.sqrt(jax.nn.softplus(logits))
        case _:
            raise MegaMoEError(f"scoring is {scoring!r}, wanted one of {', '.join(get_args(Scoring))}: choose one.")


def _mask_groups(selection: jax.Array, num_groups: int, top_groups: int) -> jax.Array:
    groups = selection.reshape(*selection.shape[:-1], num_groups, -1)
    best_two = jax.lax.top_k(groups, min(2, groups.shape[-1]))[0]
    kept = jax.lax.top_k(jnp.sum(best_two, axis=-1), top_groups)[1]
    keep = jnp.any(kept[..., None] == jnp.arange(num_groups), axis=-2)
    return jnp.where(keep[..., None], groups, -jnp.inf).reshape(selection.shape)
