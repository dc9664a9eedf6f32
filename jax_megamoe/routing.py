"""Router scores -> the experts of each token and their weights. A convenience: `moe` takes any router's results."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import PartitionSpec as P

from jax_megamoe.arrays import as_array, check_flag, clamp_to_int32, require_device_memory, text_of
from jax_megamoe.errors import ArgumentError, DTypeError, ShapeError, ShardingError
from jax_megamoe.primitives import _specs
from jax_megamoe.primitives.route import RouteParams, check_served, route_by_kernel, serves_by_default
from jax_megamoe.routing_arrays import GroupScoring, Scoring, route_arrays

RouteImplementation = Literal["cuda", "reference"]


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
    implementation: RouteImplementation | None = None,
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
      implementation: "cuda" is one kernel, or an error: on one Hopper GPU, or in `jax.shard_map`, without hash tables
        and images, for up to 1024 experts and a top_k of 32. None is the same for up to 512 tokens where it can be, and
        elsewhere, also in programs of `jax.export`, array code, as "reference" is everywhere.

    Raises:
      ShapeError, DTypeError: for arguments of the wrong shape or dtype, or numbers that do not fit each other.
      ArgumentError: for an unknown `scoring` or `group_scoring`, numbers that are no ints known while tracing, and
        one of `token_ids` and `hash_table`, or of `image_bias` and `is_image`, without the other.
      PlatformError, ShardingError, NotImplementedError: where "cuda" is wanted and cannot be had: elsewhere than on a
        Hopper GPU, in a program that XLA would have to split, and under `jax.vmap` over `bias`.
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
    if not 0 < num_experts < 1 << 31:
        raise ShapeError(
            f"logits has shape {logits.shape}, wanted [..., E] with 0 < E < 2^31: pass one score per expert."
        )
    _check_choice("scoring", scoring, get_args(Scoring))
    _check_choice("group_scoring", group_scoring, get_args(GroupScoring))
    if implementation is not None:
        _check_choice("implementation", implementation, get_args(RouteImplementation))
    _check_int("num_groups", num_groups)
    if num_groups < 1 or num_experts % num_groups:
        raise ShapeError(
            f"num_groups is {text_of(num_groups)}, wanted a divisor of {num_experts} experts: choose another."
        )
    if top_groups is None:
        top_groups = num_groups
    _check_int("top_groups", top_groups)
    if not 1 <= top_groups <= num_groups:
        raise ShapeError(f"top_groups is {text_of(top_groups)}, wanted 1 to num_groups = {num_groups}: choose another.")
    selectable = top_groups * (num_experts // num_groups)
    _check_int("top_k", top_k)
    if not 1 <= top_k <= selectable:
        raise ShapeError(
            f"top_k is {text_of(top_k)}, wanted 1 to {selectable}, the experts to select from: choose another."
        )
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
    params = RouteParams(int(top_k), scoring, int(num_groups), int(top_groups), group_scoring, bool(renormalize))
    if is_required := implementation == "cuda":
        _check_kernel(logits, params, token_ids=token_ids, image_bias=image_bias)
    has_more = token_ids is not None or image_bias is not None
    is_default = implementation is None and not has_more and serves_by_default(logits, params)
    by_kernel = is_required or (is_default and _specs.is_on_one_device())
    selected = functools.partial(_route, params=params, by_kernel=by_kernel, is_required=is_required)
    # Tokens stay split as they are; experts that are split are gathered.
    spec = P(*jax.typeof(logits).sharding.spec[:-1], None)
    ids, weights = _specs.call_with_types(selected, arrays, (spec, spec))
    return ids, weights


# Compiled, also where the caller's program is not: its constants would be transfers to the device.
@functools.partial(jax.jit, static_argnames=("params", "by_kernel", "is_required"))
def _route(
    logits: jax.Array,
    bias: jax.Array | None,
    token_ids: jax.Array | None,
    hash_table: jax.Array | None,
    image_bias: jax.Array | None,
    is_image: jax.Array | None,
    *,
    params: RouteParams,
    by_kernel: bool,
    is_required: bool,
) -> tuple[jax.Array, jax.Array]:
    if by_kernel:
        return route_by_kernel(logits, bias, params, is_required)
    return route_arrays(logits, bias, token_ids, hash_table, image_bias, is_image, **params._asdict())


def _check_kernel(logits: jax.Array | np.ndarray, params: RouteParams, **arrays: object) -> None:
    """Raises where the kernel was asked for and cannot be had, as far as that is known while tracing."""
    for name, array in arrays.items():
        if array is not None:
            raise ArgumentError(
                f"{name} is given and implementation is 'cuda', which has no {name}: leave implementation out."
            )
    check_served(logits, params)
    if not _specs.is_on_one_device():
        raise ShardingError(
            f"implementation of route is 'cuda' on the mesh ({jax.sharding.get_abstract_mesh()}), wanted all of its "
            "axes manual: call it in jax.shard_map over all axes, or leave implementation out."
        )


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
        raise ArgumentError(f"{name} is {text_of(value)}, wanted one of {', '.join(choices)}: choose one.")


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ArgumentError(f"{name} is {text_of(value)}, wanted an int known while tracing: pass a Python number.")
