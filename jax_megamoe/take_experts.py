"""Weights of other experts, or in another order, from those that there are: replicas of the busy ones, for instance."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jax_megamoe import _compat
from jax_megamoe.arguments import check_weights
from jax_megamoe.arrays import Array, as_array, clamp_to_int32, require_device_memory, require_same_devices, unwrap
from jax_megamoe.collectives import check_share
from jax_megamoe.errors import ArgumentError, DTypeError, ShapeError
from jax_megamoe.operands import Leaves
from jax_megamoe.placement import EXPERT_AXIS, AxisNames, find_placement_of_weights
from jax_megamoe.primitives import _specs
from jax_megamoe.primitives._specs import axes_size, axes_text
from jax_megamoe.weights import ExpertWeights


def take_experts(weights: ExpertWeights, expert_ids: Array, *, expert_axis: AxisNames = EXPERT_AXIS) -> ExpertWeights:
    """Weights whose expert p is expert `expert_ids[p]` of these, bit for bit.

    Where `expert_axis` splits the experts, the result is split likewise, and each device is sent the experts that it
    holds then. Beside weights and result it needs room for two of its layers, and two experts for each rank. With as
    many experts as before, and the weights donated (`jax.jit(mm.take_experts, donate_argnums=0)`), the result takes
    their memory.

    Args:
      weights: of one layer, or stacked.
      expert_ids: int[P], or int[L, P] for another choice in each layer of stacked weights, traced or not, on all
        devices; any may come several times, and any may be missing. Ids count the experts of all devices, and so does
        P, inside `jax.shard_map` too. NumPy's outside [0, E) are an error; values of jax arrays are clamped.
      expert_axis: as for `moe`.

    Raises:
      ShapeError, DTypeError, LayoutError, ShardingError: for arrays that cannot be served, and where the devices along
        `expert_axis` do not divide P. ArgumentError: for ids of NumPy that name no expert.
    """
    weights = check_weights(unwrap(weights))
    ids = as_array("expert_ids", expert_ids, "an array of int32")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise DTypeError(f"expert_ids has dtype {ids.dtype}, wanted an integer type: pass the ids of experts.")
    leads = [()] if weights.num_layers is None else [(), (weights.num_layers,)]
    if ids.ndim == 0 or ids.shape[:-1] not in leads or ids.shape[-1] == 0:
        wanted = "[P]" if weights.num_layers is None else f"[P] or [{weights.num_layers}, P], a row for each layer"
        raise ShapeError(f"expert_ids has shape {ids.shape}, wanted {wanted}: pass an id for each expert to be.")
    require_device_memory("expert_ids", ids)
    # Where the leaves of the weights are, find_placement_of_weights looks.
    require_same_devices({"weights.gate_up": weights.gate_up, "expert_ids": ids})
    num_experts, num_taken = weights.num_experts, ids.shape[-1]
    if isinstance(ids, np.ndarray):
        if not ((ids >= 0) & (ids < num_experts)).all():
            wrong = ids[(ids < 0) | (ids >= num_experts)][0]
            raise ArgumentError(f"expert_ids has {wrong}, wanted 0 to {num_experts - 1}: pass the ids of experts.")
        ids = clamp_to_int32(ids)
    mesh, axes = find_placement_of_weights(weights, expert_axis=expert_axis)
    split = () if mesh.empty else _specs.split_of_experts(Leaves(*map(jax.typeof, weights.leaves)), mesh, axes)
    num_held, manual = weights.leaves.gate_up.shape[-4], tuple(axis for axis in axes if axis in mesh.manual_axes)
    if mesh.manual_axes:
        check_share(weights.leaves, num_held, num_experts, manual, mesh.shape)
    # Inside shard_map a device may have all experts.
    over = tuple(axis for axis in axes if axis in split or (axis in manual and num_held != num_experts))
    num_ranks = axes_size(mesh, over)
    if num_taken % num_ranks:
        raise ShapeError(
            f"expert_ids has {num_taken} experts, wanted a multiple of the {num_ranks} devices along "
            f"{axes_text(over)}: take some more replicas."
        )
    taken = _take_on_mesh(
        weights.leaves,
        ids,
        mesh=mesh,
        split=split,
        check_vma=_compat.tracks_varying() or not mesh.manual_axes,
        num_experts=num_experts,
        over=over,
        num_ranks=num_ranks,
    )
    return dataclasses.replace(weights, **taken._asdict(), num_experts=num_taken)


@functools.partial(jax.jit, static_argnames=("mesh", "split", "check_vma", "num_experts", "over", "num_ranks"))
def _take_on_mesh(
    leaves: Leaves, expert_ids: jax.Array, *, mesh: AbstractMesh, split: tuple[str, ...], check_vma: bool, **params: Any
) -> Leaves:
    """`_take` on the devices of all axes that are not manual yet, of which `split` splits the experts."""
    per_device: Any = functools.partial(_take, **params)
    automatic = set(mesh.axis_names) - set(mesh.manual_axes)
    if automatic:
        specs = Leaves(*(P(*(None,) * (leaf.ndim - 4), split or None) for leaf in leaves))
        leaves = Leaves(*(_specs.reshard(leaf, mesh, spec) for leaf, spec in zip(leaves, specs, strict=True)))
        expert_ids = _specs.reshard(expert_ids, mesh, P())
        per_device = jax.shard_map(
            per_device,
            mesh=mesh,
            in_specs=(specs, P()),
            out_specs=specs,
            axis_names=automatic,
            check_vma=check_vma,
        )
    taken: Leaves = per_device(leaves, expert_ids)
    return taken


def _take(leaves: Leaves, expert_ids: jax.Array, *, num_experts: int, over: tuple[str, ...], num_ranks: int) -> Leaves:
    """One device's part: leaves [E/n, ...] or [L, E/n, ...], ids int[P] or int[L, P] of all -> leaves with P/n."""
    # XLA on CPUs gathers FP8 by way of wider floats; bytes it just moves.
    rows = [_as_bytes(leaf) if leaf.ndim == 5 else _as_bytes(leaf)[None] for leaf in leaves]
    (num_layers, num_held), num_taken = rows[0].shape[:2], expert_ids.shape[-1] // num_ranks
    ids = jnp.broadcast_to(jnp.clip(clamp_to_int32(expert_ids), 0, num_experts - 1), (num_layers, expert_ids.shape[-1]))
    # Of as many experts as before each layer goes where it was read from: the memory can be that of the weights.
    in_place = num_taken == num_held

    def take_layer(layer: jax.Array, taken: list[jax.Array]) -> list[jax.Array]:
        experts = [row[layer] for row in (taken if in_place else rows)]
        if num_ranks > 1:
            experts = _exchange(experts, ids[layer], over, num_ranks)
        else:
            experts = [row[ids[layer]] for row in experts]
        return [row.at[layer].set(new) for row, new in zip(taken, experts, strict=True)]

    start = rows if in_place else [_room(row, num_taken) for row in rows]
    taken = jax.lax.fori_loop(0, num_layers, take_layer, start)
    return Leaves(
        *(
            jax.lax.bitcast_convert_type(row if leaf.ndim == 5 else row[0], leaf.dtype)
            for row, leaf in zip(taken, leaves, strict=True)
        )
    )


def _as_bytes(leaf: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(leaf, jnp.uint8) if leaf.dtype.itemsize == 1 else jnp.asarray(leaf)


def _exchange(experts: list[jax.Array], ids: jax.Array, over: tuple[str, ...], num_ranks: int) -> list[jax.Array]:
    """A layer's arrays [E/n, ...] of each rank, the ids int32[P] of all -> arrays [P/n, ...].

    One expert for each rank at a time: everybody sends what is wanted, or anything in its stead, and the owner's is
    kept. So the ids may be traced, and nobody ever holds what all ranks have.
    """
    num_held, num_taken = experts[0].shape[0], ids.shape[0] // num_ranks
    ids = ids.reshape(num_ranks, num_taken)
    rank = jax.lax.axis_index(over)

    def exchange_one(place: jax.Array, taken: list[jax.Array]) -> list[jax.Array]:
        wanted = ids[:, place]
        sent = [row[wanted % num_held] for row in experts]
        received = [jax.lax.all_to_all(row, over, split_axis=0, concat_axis=0) for row in sent]
        owner = wanted[rank] // num_held
        return [row.at[place].set(parts[owner]) for row, parts in zip(taken, received, strict=True)]

    start = [_room(row[None], num_taken)[0] for row in experts]
    return jax.lax.fori_loop(0, num_taken, exchange_one, start)


def _room(row: jax.Array, num_experts: int) -> jax.Array:
    """[L, E, ...] -> [L, num_experts, ...] of anything, which varies over the mesh axes over which the array does."""
    return jnp.broadcast_to(row[:, :1], (row.shape[0], num_experts, *row.shape[2:]))
