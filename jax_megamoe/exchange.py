"""What one device does inside a manual region: its experts, and XLA's collectives around them."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_megamoe.errors import ShapeError
from jax_megamoe.primitives import _compat


def moe_per_device(
    local_op: Callable[..., tuple[jax.Array, jax.Array]],
    x: jax.Array,
    leaves: tuple[jax.Array, ...],
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: jax.Array,
    *,
    num_experts: int,
    expert_axes: tuple[str, ...],
    token_axes: Iterable[str],
    axis_sizes: Mapping[str, int],
    with_load: bool,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    """This device's tokens x bf16[T, H] through the experts of all devices: y bf16[T, H], load int32[E_local].

    The ranks along `expert_axes` hold E_local = num_experts / n experts each, in the order of the axes. Along those of
    them over which the tokens are split, tokens are gathered and results scattered; along the others every rank has the
    same tokens, so that results are only added up. topk_ids int32[T, k] are global. `local_op` has the signature of
    `reference.moe_local`.

    Where the compiler marks what varies (check_vma=True), the marks tell how the tokens are split; else `token_axes`.
    Without `with_load`, load is zero, and nothing has to be added up.
    """
    num_ranks = math.prod(axis_sizes[axis] for axis in expert_axes)
    num_local_experts = leaves[0].shape[-4]
    is_split = num_local_experts != num_experts
    if is_split and num_local_experts * num_ranks != num_experts:
        raise ShapeError(
            f"weights hold {num_local_experts} experts on each device, wanted {num_experts} / {num_ranks} along "
            f"expert_axis {expert_axes} or all {num_experts}: shard dimension E over that axis and no other."
        )
    if _compat.tracks_varying():
        split_axes = _compat.varying_axes(x, topk_ids, topk_weights)
    else:
        split_axes = frozenset(token_axes) & frozenset(axis_sizes)
    gathered = tuple(axis for axis in expert_axes if axis in split_axes) if is_split else ()
    added = tuple(axis for axis in expert_axes if axis not in split_axes) if is_split or num_ranks == 1 else ()
    counted = tuple(axis for axis in axis_sizes if axis in split_axes and not (is_split and axis in expert_axes))

    tokens, ids, routing = x, topk_ids, topk_weights
    if gathered and x.shape[0] > 0:
        tokens, ids, routing = (jax.lax.all_gather(v, gathered, axis=0, tiled=True) for v in (tokens, ids, routing))
    if is_split:
        # Ids of other ranks' experts fall outside [0, E_local), as do unused slots.
        ids = ids - jax.lax.axis_index(expert_axes) * num_local_experts
    # Rounded once, after all ranks' sums have been added.
    out_dtype = jnp.float32 if is_split else jnp.bfloat16
    operands = _compat.align_varying((tokens, *leaves, ids, routing, layer))
    y, load = local_op(*operands, out_dtype=out_dtype, **params)
    if x.shape[0] == 0:
        y = x
    else:
        if gathered:
            y = _sum_over_ranks(y, gathered, math.prod(axis_sizes[axis] for axis in gathered))
        if added:
            # With one rank this changes nothing but the mark: the result varies like the tokens, not like the weights.
            y = jax.lax.psum(y, added)
    if not with_load:
        load = jnp.zeros(load.shape, load.dtype)  # Varies over no axis.
    elif counted:
        load = jax.lax.psum(load, counted)
    return y.astype(jnp.bfloat16), load


def _sum_over_ranks(y: jax.Array, axes: tuple[str, ...], num_ranks: int) -> jax.Array:
    """Contributions f32[num_ranks * T, H] of this rank to all ranks' tokens -> the sum over ranks for its own T.

    An all-to-all and additions in the order of the ranks: as many bytes out of each device as a reduce-scatter, whose
    order is the library's choice, of the topology, and of where in the group a token's rank stands.
    """
    parts = jax.lax.all_to_all(y.reshape(num_ranks, -1, y.shape[-1]), axes, split_axis=0, concat_axis=0)
    total = parts[0]
    for rank in range(1, num_ranks):
        total = total + parts[rank]
    return total
