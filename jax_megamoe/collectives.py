"""What one device does inside a manual region, and how XLA's collectives give it other ranks' tokens and results."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_megamoe import _compat, quantization
from jax_megamoe.errors import ShapeError, ShardingError
from jax_megamoe.operands import Leaves, Operands
from jax_megamoe.primitives._specs import axes_text

Op = Callable[..., tuple[jax.Array, jax.Array]]


def moe_per_device(
    operands: Operands,
    local_op: Op,
    group_op: Op,
    *,
    num_experts: int,
    expert_axes: tuple[str, ...],
    token_axes: Iterable[str],
    axis_sizes: Mapping[str, int],
    with_load: bool,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    """This device's tokens x bf16[T, H] through the experts of all devices: y bf16[T, H], load int32[E_local].

    The ranks along `expert_axes` hold E_local = num_experts / n experts each, in the order of the axes; over some of
    these axes, over all or none, the tokens are split, along the others every rank has the same tokens. topk_ids
    int32[T, k] are global. Where a device has all experts, `local_op` serves, which has the signature of
    `reference.moe_local`; else `group_op`, that of `through_collectives` without its second argument.

    Where the compiler marks what varies (check_vma=True), the marks tell how the tokens are split; else `token_axes`.
    They also tell whether a device has all experts where the axes could split them; nothing else does.
    Without `with_load`, load is zero, and nothing has to be added up.
    """
    num_ranks = math.prod(axis_sizes[axis] for axis in expert_axes)
    num_local_experts = operands.num_routed_experts
    check_share(operands.leaves, num_local_experts, num_experts, expert_axes, axis_sizes)
    is_split = num_local_experts != num_experts
    no_load = jnp.zeros(num_local_experts, jnp.int32)  # Varies over no axis.
    if operands.x.shape[0] == 0:
        return operands.x, no_load
    if _compat.tracks_varying():
        split_axes = _compat.varying_axes(operands.x, operands.topk_ids, operands.topk_weights)
    else:
        split_axes = frozenset(token_axes) & frozenset(axis_sizes)

    if is_split and operands.shared:
        ids = ids_in_group(
            operands.topk_ids,
            num_routed_local=num_local_experts,
            num_shared=operands.num_shared_experts,
            expert_axes=expert_axes,
            split_axes=split_axes,
            axis_sizes=axis_sizes,
        )
        operands = operands._replace(topk_ids=ids)
    operands = Operands.of(_compat.align_varying(operands.row))
    if is_split:
        gathered = tuple(axis for axis in expert_axes if axis in split_axes)
        y, load = group_op(operands, expert_axes=expert_axes, gathered_axes=gathered, **params)
    else:
        y, load = local_op(operands, **params)
        same = tuple(axis for axis in expert_axes if axis not in split_axes)
        if num_ranks == 1 and same:
            # This changes nothing but the mark: the result varies like the tokens, not like the weights.
            y = jax.lax.psum(y, same)
    load = load[operands.num_shared_experts :]  # theirs come first
    counted = tuple(axis for axis in axis_sizes if axis in split_axes and not (is_split and axis in expert_axes))
    if not with_load:
        load = no_load
    elif counted:
        load = jax.lax.psum(load, counted)
    return y, load


def ids_in_group(
    topk_ids: jax.Array,
    *,
    num_routed_local: int,
    num_shared: int,
    expert_axes: tuple[str, ...],
    split_axes: frozenset[str],
    axis_sizes: Mapping[str, int],
) -> jax.Array:
    """Ids int32[T, k] of a call, its shared experts' first -> ids of a group whose ranks have S + E_local experts each.

    A token's shared experts are those of the rank that has the token. Along axes over which the tokens are not split
    several ranks have it: they take turns, by the token's number, so that each computes a part, and each token once.
    """
    rank, turn = jnp.int32(0), jnp.arange(topk_ids.shape[0], dtype=jnp.int32)
    for axis in expert_axes:
        size = axis_sizes[axis]
        if axis in split_axes:
            rank = rank * size + jax.lax.axis_index(axis)
        else:
            rank, turn = rank * size + turn % size, turn // size
    own = jnp.reshape(rank, (-1, 1)) * (num_shared + num_routed_local)
    of_group = topk_ids + (topk_ids - num_shared) // num_routed_local * num_shared
    return jnp.where(topk_ids < 0, -1, jnp.where(topk_ids < num_shared, own + topk_ids, of_group))


def check_share(
    leaves: Leaves,
    num_local_experts: int,
    num_experts: int,
    expert_axes: tuple[str, ...],
    axis_sizes: Mapping[str, int],
) -> None:
    """Raises where a device's experts are neither its share of all of them, as far as marks tell, nor all of them."""
    num_ranks = math.prod(axis_sizes[axis] for axis in expert_axes)
    tells = _compat.tracks_varying()
    if num_local_experts * num_ranks == num_experts:
        same = [a for a in expert_axes if tells and axis_sizes[a] > 1 and a not in _compat.varying_axes(*leaves)]
        if same:
            raise ShardingError(
                f"weights are the same on all devices along {axes_text(same)}, of expert_axis, wanted other experts on "
                "each: pass as expert_axis the axes that the in_specs of jax.shard_map split them over, in that order."
            )
        return
    if num_local_experts == num_experts:
        if tells and not any(axis_sizes[axis] > 1 for axis in _compat.varying_axes(*leaves) & set(expert_axes)):
            return
        # Made by a device from its own experts, weights count these alone unless told better.
        wanted = num_local_experts * num_ranks
        raise ShapeError(
            f"weights hold {num_local_experts} experts on each of {num_ranks} devices along {axes_text(expert_axes)} "
            f"and say that there are {num_experts} in all, wanted {wanted}: pass num_experts={wanted} to "
            "quantize_experts or pack_experts inside jax.shard_map"
            + ("." if tells else ", or expert_axis=None to moe where each device has all experts.")
        )
    if expert_axes:
        raise ShapeError(
            f"weights hold {num_local_experts} experts on each device, wanted {num_experts} / {num_ranks} along "
            f"{axes_text(expert_axes)} or all {num_experts}: shard dimension E over these axes and no other, or say "
            "with num_experts= of quantize_experts or pack_experts how many there are in all."
        )
    raise ShapeError(
        f"weights hold {num_local_experts} of {num_experts} experts, wanted all of them where no mesh axis splits "
        f"them: pass as expert_axis what does, of {axes_text(axis_sizes)}."
    )


def through_collectives(
    operands: Operands,
    local_op: Op,
    *,
    expert_axes: tuple[str, ...],
    gathered_axes: tuple[str, ...],
    batch_invariant: bool = False,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    """The experts of all ranks along `expert_axes`, as XLA's collectives around the experts of one.

    x bf16[T, H], leaves of E_local experts, topk_ids int32[T, k] (global), topk_weights f32[T, k], layer int32[] ->
    y bf16[T, H], load int32[E_local] of all tokens along `expert_axes`. Over `gathered_axes`, some of the former, the
    tokens are split: they are gathered, in FP8, and each rank's sums of slots go back to their ranks, in BF16 in
    programs for GPUs and in FP32 elsewhere. Along the others every rank has the same tokens, so that sums are only
    added up, in FP32. How a rank's slots are added before that depends on how many ranks there are: with
    `batch_invariant` each slot's result travels, in BF16, and they are added in slot order at the end.
    """
    (num_tokens, top_k), num_local_experts = operands.topk_ids.shape, operands.num_local_experts
    if gathered_axes:
        operands = _gather_tokens(operands, gathered_axes)
    # Ids of other ranks' experts fall outside [0, E_local), as do unused slots.
    local_ids = operands.topk_ids - jax.lax.axis_index(expert_axes) * num_local_experts
    operands = operands._replace(topk_ids=local_ids)
    if batch_invariant:
        operands = _one_slot_each(operands)
    # Sums of slots are rounded after all ranks' have been added, but on their way to other GPUs. A slot's result is in
    # BF16 anyway.
    dtype = jnp.bfloat16 if batch_invariant else jnp.float32
    y, load = local_op(operands, out_dtype=dtype, batch_invariant=batch_invariant, **params)
    if gathered_axes:
        y = _sum_over_ranks(y, gathered_axes, num_tokens * (top_k if batch_invariant else 1))
    if batch_invariant:
        # One rank had a slot's expert, and the others added zeros to it: in whatever order, nothing is rounded.
        y = y.astype(jnp.bfloat16)
    if added_axes := tuple(axis for axis in expert_axes if axis not in gathered_axes):
        y = jax.lax.psum(y, added_axes)
    if batch_invariant:
        y = _sum_of_slots(y.reshape(num_tokens, top_k, -1))
    return quantization.round_to_bf16(y).astype(jnp.bfloat16), load


def _gather_tokens(operands: Operands, axes: tuple[str, ...]) -> Operands:
    """The tokens of all ranks along the axes, x bf16[ranks * T, H] of the same FP8 values and scales as theirs.

    One collective of bytes: FP8 is no type of every backend's collectives, and few tokens wait for each of them.
    """
    values, amax = quantization.quantize_tokens_to_send(operands.x)
    parts = (values, amax, operands.topk_ids, operands.topk_weights)
    rows = jnp.concatenate([_to_bytes(part) for part in parts], axis=1)
    rows = jax.lax.all_gather(rows, axes, axis=0, tiled=True)
    ends = list(itertools.accumulate(part.shape[1] * part.dtype.itemsize for part in parts))
    pieces = jnp.split(rows, ends[:-1], axis=1)
    values, amax, ids, weights = (_from_bytes(piece, part.dtype) for piece, part in zip(pieces, parts, strict=True))
    return operands._replace(x=quantization.restore_tokens(values, amax), topk_ids=ids, topk_weights=weights)


def _to_bytes(array: jax.Array) -> jax.Array:
    """[T, N] of any type -> uint8[T, N * its size]."""
    return jax.lax.bitcast_convert_type(array, jnp.uint8).reshape(array.shape[0], -1)


def _from_bytes(rows: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `_to_bytes`."""
    size = jnp.dtype(dtype).itemsize
    # Bytes of one number are a dimension of their own, unless it has but one.
    numbers = rows if size == 1 else rows.reshape(rows.shape[0], -1, size)
    return jax.lax.bitcast_convert_type(numbers, dtype)


def _one_slot_each(operands: Operands) -> Operands:
    """Each slot of x bf16[T, H] as a token of its own: x bf16[T * k, H], ids and weights [T * k, 1]."""
    x = jnp.repeat(operands.x, operands.topk_ids.shape[1], axis=0)
    ids, weights = (value.reshape(-1, 1) for value in (operands.topk_ids, operands.topk_weights))
    return operands._replace(x=x, topk_ids=ids, topk_weights=weights)


def _sum_of_slots(results: jax.Array) -> jax.Array:
    """Results bf16[T, k, H] -> f32[T, H], added in the order of the slots."""
    total = results[:, 0].astype(jnp.float32)
    for slot in range(1, results.shape[1]):
        total = total + results[:, slot].astype(jnp.float32)
    return total


def _sum_over_ranks(y: jax.Array, axes: tuple[str, ...], num_tokens: int) -> jax.Array:
    """What this rank has for all ranks' tokens, f32 or bf16[ranks * T, H] -> f32[T, H], the sum over ranks for its own.

    An all-to-all and additions in the order of the ranks: as many bytes out of each device as a reduce-scatter, whose
    order is the library's choice, of the topology, and of where in the group a token's rank stands, and which would
    round each sum of two where they travel in BF16.
    """
    parts = y.reshape(-1, num_tokens, y.shape[-1])
    exchange = _exchange_bf16 if y.dtype == jnp.bfloat16 else _exchange_for_platform
    parts = exchange(parts, axes)
    total: jax.Array = parts[0].astype(jnp.float32)
    for rank in range(1, parts.shape[0]):
        total = total + parts[rank].astype(jnp.float32)
    return total


def _exchange_for_platform(parts: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`_exchange` of FP32 numbers, rounded to BF16 in programs for GPUs.

    There half the bytes are worth a rounding, since wires between hosts are slow. Elsewhere nothing is rounded.
    """
    exchanged: jax.Array = jax.lax.platform_dependent(
        parts, cuda=functools.partial(_exchange_bf16, axes=axes), default=functools.partial(_exchange, axes=axes)
    )
    return exchanged


def _exchange(parts: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[ranks, T, H], what this rank has for each of them -> [ranks, T, H], what each of them has for this one."""
    exchanged: jax.Array = jax.lax.all_to_all(parts, axes, split_axis=0, concat_axis=0)
    return exchanged


def _exchange_bf16(parts: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`_exchange` of numbers rounded to BF16, if they are not BF16; of the same type as before."""
    # As integers: for CPUs XLA would make FP32 of it, twice the bytes, and skip the rounding.
    bits = jax.lax.bitcast_convert_type(parts.astype(jnp.bfloat16), jnp.uint16)
    return jax.lax.bitcast_convert_type(_exchange(bits, axes), jnp.bfloat16).astype(parts.dtype)
