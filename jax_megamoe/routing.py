"""Router scores -> the experts of each token and their weights. A convenience: `moe` takes any router's results."""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import PartitionSpec as P

from jax_megamoe.arrays import as_array, check_flag, clamp_to_int32, require_device_memory
from jax_megamoe.errors import ArgumentError, DTypeError, ShapeError
from jax_megamoe.primitives import _specs

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
GroupScoring = Literal["sum_of_two", "max"]

# sqrt(log(1 + exp(x))) = exp(x / 2) * (1 - exp(x) / 4 + ...): from here down, the factor is 1 in FP32.
_SMALL_LOGIT = -16.0
_SUBNORMAL_LOGIT = 2 * math.log(jnp.finfo(jnp.float32).tiny)
_LOG_OF_STEPS = 149 * math.log(2)  # a subnormal float is its bits times 2^-149


def route(
    logits: jax.Array | np.ndarray,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    bias: jax.Array | np.ndarray | None = None,
    num_groups: int = 1,
    top_groups: int | None = None,
    group_scoring: GroupScoring = "sum_of_two",
    renormalize: bool = True,
    token_ids: jax.Array | np.ndarray | None = None,
    hash_table: jax.Array | np.ndarray | None = None,
    image_bias: jax.Array | np.ndarray | None = None,
    is_image: jax.Array | np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Selects `top_k` experts per token: logits float [..., E] -> ids int32[..., k], weights f32[..., k].

    The experts come in the order of descending score, of equal scores the lower id first. Any leading dimensions do,
    of size 0 too. What one token's logits are has no influence on the others.

    A score that is NaN counts as the highest: NaN among a token's logits selects the experts that have it ("softmax":
    the first experts, since all its scores are NaN), and makes the token's weights NaN (without `renormalize` and
    "softmax": those of these experts). Ids are distinct and in [0, E) whatever the logits are. A logit of -inf scores
    zero; with "softmax" one of +inf, or nothing but -inf, is NaN. With "sqrtsoftplus" +inf scores infinity, which is
    NaN when renormalised; NaN in `bias` selects its expert for every token.

    Args:
      logits: the router's output; computed with in FP32.
      top_k: experts per token.
      scoring: what turns logits into scores: "softmax" over all experts, "sigmoid", or "sqrtsoftplus",
        sqrt(log(1 + exp(logit))).
      bias: f32[E], added to the scores for the selection only, never to the weights.
      num_groups: the experts form this many groups of consecutive ids.
      top_groups: selects only among this many groups, those whose (biased) scores are best; None means all groups.
      group_scoring: the score of a group: "sum_of_two", the sum of its two best ones (DeepSeek-V3), or "max", its best
        one (DeepSeek-V2).
      renormalize: divides the selected scores by their sum; where all of them underflow to zero, which "sigmoid" does
        below -88, weights are zeros. No scaling factor is applied here; `moe` takes one.
      token_ids: int [...], the token's ids in the vocabulary, for hash routing.
      hash_table: int [vocabulary, k], the experts of each id: with it and `token_ids`, they are selected instead, in
        the table's order, and logits give the weights alone; bias and groups are of no influence. The slots of token
        ids outside of the table, and of entries outside [0, E), are unused: id -1, weight 0.
      image_bias: f32[E], what is added for the selection instead of `bias` for the tokens of images; with a hash table
        they are selected by their biased scores, like in other layers.
      is_image: bool [...], which tokens these are.

    Raises:
      ShapeError, DTypeError: for arguments of the wrong shape or dtype, or numbers that do not fit each other.
      ArgumentError: for an unknown `scoring` or `group_scoring`, numbers that are no ints known while tracing, and
        one of `token_ids` and `hash_table`, or of `image_bias` and `is_image`, without the other.
    """
    logits = as_array("logits", logits)
    if logits.ndim == 0:
        raise ShapeError("logits is a scalar, wanted [..., E]: pass one score per expert.")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise DTypeError(f"logits has dtype {logits.dtype}, wanted a floating-point type: cast it.")
    num_experts = logits.shape[-1]
    if export.is_symbolic_dim(num_experts):
        raise ShapeError(
            f"logits has shape {logits.shape}, wanted a number of experts, also under jax.export: pass it."
        )
    check_flag("renormalize", renormalize)
    if num_experts == 0:
        raise ShapeError(f"logits has shape {logits.shape}, wanted [..., E] with E > 0: pass one score per expert.")
    _check_choice("scoring", scoring, get_args(Scoring))
    _check_choice("group_scoring", group_scoring, get_args(GroupScoring))
    _check_int("num_groups", num_groups)
    if num_groups < 1 or num_experts % num_groups:
        raise ShapeError(f"num_groups is {num_groups}, wanted a divisor of {num_experts} experts: choose another.")
    if top_groups is None:
        top_groups = num_groups
    _check_int("top_groups", top_groups)
    if not 1 <= top_groups <= num_groups:
        raise ShapeError(f"top_groups is {top_groups}, wanted 1 to num_groups = {num_groups}: choose another.")
    selectable = top_groups * (num_experts // num_groups)
    _check_int("top_k", top_k)
    if not 1 <= top_k <= selectable:
        raise ShapeError(f"top_k is {top_k}, wanted 1 to {selectable}, the experts to select from: choose another.")
    bias = None if bias is None else _as_bias("bias", bias, num_experts)
    _check_both(token_ids=token_ids, hash_table=hash_table)
    _check_both(image_bias=image_bias, is_image=is_image)
    if image_bias is not None:
        image_bias, is_image = _as_bias("image_bias", image_bias, num_experts), as_array("is_image", is_image)
        if is_image.dtype != jnp.bool:
            raise DTypeError(f"is_image has dtype {is_image.dtype}, wanted bool: pass a mask of tokens.")
        if is_image.shape != logits.shape[:-1]:
            raise ShapeError(
                f"is_image has shape {is_image.shape}, wanted {logits.shape[:-1]} like logits without the experts: "
                "reshape it."
            )
    if token_ids is not None:
        token_ids, hash_table = as_array("token_ids", token_ids), as_array("hash_table", hash_table)
        _check_hash(token_ids, hash_table, logits.shape[:-1], top_k)
        token_ids, hash_table = (
            clamp_to_int32(ids) if isinstance(ids, np.ndarray) else ids for ids in (token_ids, hash_table)
        )
    arrays = {
        "logits": logits,
        "bias": bias,
        "token_ids": token_ids,
        "hash_table": hash_table,
        "image_bias": image_bias,
        "is_image": is_image,
    }
    for name, array in arrays.items():
        if array is not None:
            require_device_memory(name, array)
    selected = functools.partial(
        _route,
        top_k=int(top_k),
        scoring=scoring,
        num_groups=int(num_groups),
        top_groups=int(top_groups),
        group_scoring=group_scoring,
        renormalize=bool(renormalize),
    )
    # Tokens stay split as they are; experts that are split are gathered.
    spec = P(*jax.typeof(logits).sharding.spec[:-1], None)
    ids, weights = _specs.call_with_types(selected, arrays, (spec, spec))
    return ids, weights


# Compiled, also where the caller's program is not: its constants would be transfers to the device.
@functools.partial(
    jax.jit, static_argnames=("top_k", "scoring", "num_groups", "top_groups", "group_scoring", "renormalize")
)
def _route(
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
    logits = logits.astype(jnp.float32)
    scores = _score(logits, scoring)
    select = functools.partial(
        _select, top_k=top_k, num_groups=num_groups, top_groups=top_groups, group_scoring=group_scoring
    )
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


def _as_bias(name: str, bias: object, num_experts: int) -> jax.Array | np.ndarray:
    array = as_array(name, bias)
    if array.shape != (num_experts,):
        raise ShapeError(f"{name} has shape {array.shape}, wanted ({num_experts},): pass one value per expert.")
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise DTypeError(f"{name} has dtype {array.dtype}, wanted float32: pass real numbers.")
    # JAX would cut integers of 64 bits to 32.
    return array.astype(np.float32) if isinstance(array, np.ndarray) else array


def _check_both(**arrays: object) -> None:
    """Two arrays by name, of which one has no meaning without the other."""
    missing = [name for name, array in arrays.items() if array is None]
    if len(missing) == 1:
        given = next(name for name in arrays if name != missing[0])
        raise ArgumentError(f"{missing[0]} is None, wanted an array beside {given}: pass both or none.")


def _check_hash(token_ids: jax.Array | np.ndarray, table: jax.Array | np.ndarray, lead: object, top_k: int) -> None:
    for name, array in (("token_ids", token_ids), ("hash_table", table)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise DTypeError(f"{name} has dtype {array.dtype}, wanted an integer type: pass ids.")
    if token_ids.shape != lead:
        raise ShapeError(
            f"token_ids has shape {token_ids.shape}, wanted {lead} like logits without the experts: reshape it."
        )
    if table.ndim != 2 or table.shape[0] == 0 or table.shape[1] != top_k:
        raise ShapeError(
            f"hash_table has shape {table.shape}, wanted [vocabulary, {top_k}] for top_k = {top_k}: "
            "pass the table of this layer."
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name} is {value!r}, wanted one of {', '.join(choices)}: choose one.")


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ArgumentError(f"{name} is {value!r}, wanted an int known while tracing: pass a Python number.")
