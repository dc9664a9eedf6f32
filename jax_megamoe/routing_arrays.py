"""`route` as array code: for CPUs, for programs that XLA splits, and for what the kernel does not serve."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jax_megamoe.arrays import clamp_to_int32

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
GroupScoring = Literal["sum_of_two", "max"]

# sqrt(log(1 + exp(x))) = exp(x / 2) * (1 - exp(x) / 4 + ...): from here down, the factor is 1 in FP32.
_SMALL_LOGIT = -16.0
_SUBNORMAL_LOGIT = 2 * math.log(jnp.finfo(jnp.float32).tiny)
_LOG_OF_STEPS = 149 * math.log(2)  # a subnormal float is its bits times 2^-149


def route_arrays(
    logits: jax.Array,
    bias: jax.Array | None,
    token_ids: jax.Array | None,
    hash_table: jax.Array | None,
    image_bias: jax.Array | None,
    is_image: jax.Array | None,
    *,
    top_k: int,
    scoring: Scoring,
    num_groups: int,
    top_groups: int,
    group_scoring: GroupScoring,
    renormalize: bool,
) -> tuple[jax.Array, jax.Array]:
    """Checked arguments of `jax_megamoe.route` -> ids int32[..., k], weights f32[..., k]."""
    logits = logits.astype(jnp.float32)
    scores = _score(logits, scoring)

    def select(selection: jax.Array) -> jax.Array:
        return _select(selection, top_k, num_groups, top_groups, group_scoring)

    of_images = None if image_bias is None else _add_bias(scores, image_bias)
    if token_ids is not None and hash_table is not None:
        ids = _look_up(token_ids, hash_table, logits)
        if of_images is not None and is_image is not None:
            ids = jnp.where(is_image[..., None], select(of_images), ids)
    else:
        if bias is not None:
            selection = _add_bias(scores, bias)
        elif scoring == "sqrtsoftplus":
            in_groups = top_groups < num_groups  # whose scores are sums
            selection = _score(_raise_small(logits), scoring) if in_groups else _order_small(scores, logits)
        else:
            selection = scores
        if of_images is not None and is_image is not None:
            selection = jnp.where(is_image[..., None], of_images, selection)
        ids = select(selection)
    used = ids >= 0
    index = jnp.maximum(ids, 0)
    if renormalize and scoring == "sqrtsoftplus":
        chosen = jnp.where(used, jnp.take_along_axis(logits, index, axis=-1), -jnp.inf)
        weights = _score(_raise_small(chosen), scoring)
    else:
        weights = jnp.where(used, jnp.take_along_axis(scores, index, axis=-1), 0.0)
    if renormalize:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.where(total == 0, 1.0, total)
    return ids, weights


def _score(logits: jax.Array, scoring: Scoring) -> jax.Array:
    match scoring:
        case "softmax":
            return jax.nn.softmax(logits, axis=-1)
        case "sigmoid":
            return jax.nn.sigmoid(logits)
        case "sqrtsoftplus":
            # softplus underflows at half the logit at which its root does. The bounds keep what is not taken finite.
            root = jnp.sqrt(jax.nn.softplus(jnp.maximum(logits, _SMALL_LOGIT)))
            small = jnp.exp(jnp.minimum(logits, _SMALL_LOGIT) / 2)
            # Arithmetic flushes subnormal results to zero on some backends; moving their bits does not.
            steps = jnp.round(jnp.exp(jnp.minimum(logits, _SUBNORMAL_LOGIT) / 2 + _LOG_OF_STEPS)).astype(jnp.uint32)
            subnormal = jax.lax.bitcast_convert_type(steps, jnp.float32)
            small = jnp.where(logits < _SUBNORMAL_LOGIT, subnormal, small)
            return jnp.where(logits < _SMALL_LOGIT, small, root)


def _add_bias(scores: jax.Array, bias: jax.Array) -> jax.Array:
    return scores + jnp.expand_dims(bias.astype(jnp.float32), tuple(range(scores.ndim - 1)))


def _raise_small(logits: jax.Array) -> jax.Array:
    """Where all logits of a token are small, shifts them up, which multiplies their sqrtsoftplus by one factor.

    The order of experts and of sums over experts, and the quotients of scores, are as before, without underflow.
    """
    largest = jnp.max(jnp.where(jnp.isnan(logits), -jnp.inf, logits), axis=-1, keepdims=True)
    shift = jnp.minimum(largest - _SMALL_LOGIT, 0.0)
    return logits - jnp.maximum(shift, jnp.finfo(jnp.float32).min)


def _select(
    selection: jax.Array, top_k: int, num_groups: int, top_groups: int, group_scoring: GroupScoring
) -> jax.Array:
    """f32[..., E] -> int32[..., k], of the experts in the best groups the best ones."""
    selection = jax.lax.stop_gradient(selection)  # Ids have none, and JAX has no rule for a reduction of pairs.
    if top_groups == num_groups:
        return _best(selection, top_k)
    *lead, num_experts = selection.shape
    groups = _nan_as_infinity(selection.reshape(*lead, num_groups, num_experts // num_groups))
    scores = _nan_as_infinity(_score_groups(groups, group_scoring))
    # How many groups come before each: fewer kernels on a GPU than sorting them.
    one, other = scores[..., :, None], scores[..., None, :]
    shape = (*lead, num_groups, num_groups)
    of_one, of_other = (jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2 + i) for i in range(2))
    is_before = (other > one) | ((other == one) & (of_other < of_one))
    is_kept = jnp.sum(is_before, axis=-1, dtype=jnp.int32) < top_groups
    # What is not kept comes behind all else, -inf among it.
    candidates = jnp.where(is_kept[..., None], jnp.maximum(groups, jnp.finfo(jnp.float32).min), -jnp.inf)
    return jax.lax.top_k(candidates.reshape(selection.shape), top_k)[1].astype(jnp.int32)


def _score_groups(groups: jax.Array, group_scoring: GroupScoring) -> jax.Array:
    """f32[..., groups, experts] -> f32[..., groups]: the best expert of each, or the sum of the two best ones."""
    if group_scoring == "max" or groups.shape[-1] == 1:
        return jnp.max(groups, axis=-1)

    def best_of(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        (a, b), (c, d) = one, other
        return jnp.maximum(a, c), jnp.maximum(jnp.minimum(a, c), jnp.maximum(b, d))

    nothing = -jnp.float32(jnp.inf)
    pairs = (groups, jnp.full_like(groups, nothing))
    first, second = jax.lax.reduce(pairs, (nothing, nothing), best_of, [groups.ndim - 1])
    total: jax.Array = first + second
    return total


def _best(values: jax.Array, count: int) -> jax.Array:
    """The indices of the largest, int32[..., count]; of equal ones the lower index first, NaN counts as the largest."""
    return jax.lax.top_k(_nan_as_infinity(values), count)[1].astype(jnp.int32)


def _nan_as_infinity(values: jax.Array) -> jax.Array:
    # top_k orders NaNs by their sign. What is infinite itself comes after them, so that they are seen.
    return jnp.where(jnp.isnan(values), jnp.inf, jnp.minimum(values, jnp.finfo(jnp.float32).max))


def _order_small(scores: jax.Array, logits: jax.Array) -> jax.Array:
    """Scores, but for those that are too small for their order to be seen: they follow, below zero, by their logits."""
    return jnp.where(logits < _SUBNORMAL_LOGIT, logits, scores)


def _look_up(token_ids: jax.Array, hash_table: jax.Array, logits: jax.Array) -> jax.Array:
    """The table's experts of each token, int32[..., k]; -1 for those that do not exist."""
    vocabulary, num_experts = hash_table.shape[0], logits.shape[-1]
    token_ids, hash_table = clamp_to_int32(token_ids), clamp_to_int32(hash_table)
    known = (token_ids >= 0) & (token_ids < vocabulary)
    ids = hash_table[jnp.where(known, token_ids, 0)]
    return jnp.where(known[..., None] & (ids >= 0) & (ids < num_experts), ids, -1).astype(jnp.int32)
