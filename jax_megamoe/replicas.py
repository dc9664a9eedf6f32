"""Redundant experts: the ids of a router are those of logical experts, of which some have several physical ones.

The map is plain arrays, so that another one needs no other program. Expert p of the weights, a physical expert, is a
replica of the logical expert `expert_ids[p]`: `take_experts(weights, expert_ids)` makes such weights, `replica_map`
turns the map around, `to_physical` takes a router's ids through it, `logical_load` a load back.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_megamoe.arguments import as_number, place_number
from jax_megamoe.arrays import Array, as_array, clamp_to_int32, require_device_memory, text_of
from jax_megamoe.errors import ArgumentError, DTypeError, ShapeError
from jax_megamoe.primitives import _specs


def replica_map(expert_ids: Array, num_experts: int, max_replicas: int) -> tuple[jax.Array, jax.Array]:
    """Which physical experts each logical one has: the arguments of `to_physical`.

    Args:
      expert_ids: int[P], the logical expert of each physical one; those outside [0, E) belong to none.
      num_experts: E, the logical experts.
      max_replicas: R. Of an expert with more replicas the first ones are used.

    Returns:
      physical_ids int32[E, R], the physical experts of each logical one in ascending order, with -1 behind the last,
      and num_replicas int32[E], how many there are.

    Raises:
      ShapeError, DTypeError: for another shape or dtype. ArgumentError: for numbers that are no positive int32.
    """
    array = _integers("expert_ids", expert_ids)
    if array.ndim != 1:
        raise ShapeError(f"expert_ids has shape {array.shape}, wanted [P]: pass one expert for each physical one.")
    for name, value in (("num_experts", num_experts), ("max_replicas", max_replicas)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ArgumentError(f"{name} is {text_of(value)}, wanted a positive int known while tracing: pass one.")
        if value >= 1 << 31:
            raise ArgumentError(
                f"{name} is {text_of(value)}, wanted at most {(1 << 31) - 1}, the last int32: pass less."
            )
    if num_experts * max_replicas >= 1 << 31:
        raise ArgumentError(
            f"num_experts times max_replicas is {num_experts * max_replicas}, wanted less than 2^31: pass less."
        )
    compute = functools.partial(_replica_map, num_experts=int(num_experts), max_replicas=int(max_replicas))
    physical_ids, num_replicas = _specs.call_with_types(compute, {"expert_ids": array}, (P(None, None), P(None)))
    return physical_ids, num_replicas


def to_physical(ids: Array, physical_ids: Array, num_replicas: Array, *, first_token: int | jax.Array = 0) -> jax.Array:
    """A router's ids of logical experts as those of physical ones: int[..., k] -> int32[..., k], for `moe`.

    The replicas of an expert take turns by token: token t uses replica t modulo their number, whatever its other slots
    and the other tokens are. So of n replicas each serves every n-th token, and of any tokens in a row that all have
    the expert, loads differ by at most one. Nothing is compiled anew when the map changes.

    Args:
      ids: of logical experts. Unused slots, and ids outside [0, E), become -1.
      physical_ids: int[E, R], the replicas of each logical expert, as `replica_map` gives them.
      num_replicas: int[E], how many of the R there are; more count as R. An expert without any leaves its slots unused.
      first_token: the number of the first token, an int or an array int[], traced or not. Tokens are counted over all
        leading dimensions of `ids`: in the global view those of all devices. Inside `jax.shard_map` the ids are a
        device's own T tokens: pass `jax.lax.axis_index(axis) * T`, lest all devices begin with the same replica. So
        do steps of few tokens: pass the number of the step.

    Raises:
      ShapeError, DTypeError, ShardingError: while tracing, for an array of another shape, dtype or mesh.
      ArgumentError: for numbers of replicas in a NumPy array that are not 1 to R.
    """
    arrays = {"ids": _integers("ids", ids), **_check_map(physical_ids, num_replicas)}
    if arrays["ids"].ndim == 0:
        raise ShapeError("ids is a scalar, wanted [..., k]: pass the experts of each token.")
    number = as_number("first_token", first_token, "pass one number", "pass the number of the first token")
    if isinstance(number, int):
        number = place_number(int(np.uint32(number & 0xFFFFFFFF).view(np.int32)), *arrays.values())
    arrays["first_token"] = number
    spec = P(*jax.typeof(arrays["ids"]).sharding.spec[:-1], None)
    return _specs.call_with_types(_as_tuple(_to_physical), arrays, (spec,))[0]


def logical_load(load: Array, physical_ids: Array, num_replicas: Array) -> jax.Array:
    """The load of logical experts, the sum over their replicas: load int[..., P] of `moe` -> int32[..., E].

    Args:
      load: of all physical experts. Inside `jax.shard_map` a device has a part of it: `jax.lax.all_gather` it before.
      physical_ids, num_replicas: int[E, R] and int[E], as for `to_physical`.

    Raises:
      ShapeError, DTypeError, ShardingError, ArgumentError: as `to_physical`.
    """
    arrays = {"load": _integers("load", load), **_check_map(physical_ids, num_replicas)}
    if arrays["load"].ndim == 0:
        raise ShapeError("load is a scalar, wanted [..., P]: pass the load of each physical expert.")
    if arrays["load"].shape[-1] == 0:
        raise ShapeError(
            f"load has shape {arrays['load'].shape}, wanted [..., P] with P > 0: pass the load of each physical expert."
        )
    spec = P(*jax.typeof(arrays["load"]).sharding.spec[:-1], None)
    return _specs.call_with_types(_as_tuple(_logical_load), arrays, (spec,))[0]


def _check_map(physical_ids: Array, num_replicas: Array) -> dict[str, Array]:
    table, counts = _integers("physical_ids", physical_ids), _integers("num_replicas", num_replicas)
    if table.ndim != 2 or 0 in table.shape:
        raise ShapeError(f"physical_ids has shape {table.shape}, wanted [E, R]: pass the replicas of each expert.")
    if counts.shape != table.shape[:1]:
        raise ShapeError(
            f"num_replicas has shape {counts.shape}, wanted {table.shape[:1]} like the experts of physical_ids: "
            "pass one number for each expert."
        )
    most = table.shape[1]
    if isinstance(counts, np.ndarray) and not ((counts >= 1) & (counts <= most)).all():
        wrong = int(np.argmax((counts < 1) | (counts > most)))
        raise ArgumentError(
            f"num_replicas is {counts[wrong]} for expert {wrong}, wanted 1 to {most}, the columns of physical_ids: "
            "give every expert a replica, and physical_ids a column for each."
        )
    return {"physical_ids": table, "num_replicas": counts}


def _integers(name: str, value: object) -> Array:
    """Integers of any type on the device; those of NumPy as int32, beyond which nothing is an expert's id."""
    array = as_array(name, value, "an array of int32")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise DTypeError(f"{name} has dtype {array.dtype}, wanted an integer type: pass whole numbers.")
    if max(array.shape, default=0) >= 1 << 31:  # what is computed with them are int32
        raise ShapeError(f"{name} has shape {array.shape}, wanted sizes below 2^31: pass a part at a time.")
    require_device_memory(name, array)
    return clamp_to_int32(array) if isinstance(array, np.ndarray) else array


def _as_tuple(function: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array]]:
    return lambda *arrays: (function(*arrays),)


# Compiled, also where the caller's program is not: their constants would be transfers to the device.


@functools.partial(jax.jit, static_argnames=("num_experts", "max_replicas"))
def _replica_map(expert_ids: jax.Array, *, num_experts: int, max_replicas: int) -> tuple[jax.Array, jax.Array]:
    expert_ids = clamp_to_int32(expert_ids)
    known = (expert_ids >= 0) & (expert_ids < num_experts)
    # The replicas of an expert stand together, those of none behind all others.
    expert_ids = jnp.where(known, expert_ids, num_experts)
    order = jnp.argsort(expert_ids, stable=True).astype(jnp.int32)
    count = jnp.zeros(num_experts, jnp.int32).at[expert_ids].add(1, mode="drop")
    begin = jnp.cumsum(count) - count
    replica = jnp.arange(max_replicas, dtype=jnp.int32)[None]
    place = jnp.minimum(begin[:, None] + replica, max(len(expert_ids) - 1, 0))
    num_replicas = jnp.minimum(count, max_replicas)
    physical_ids = order[place] if len(expert_ids) else jnp.zeros(place.shape, jnp.int32)
    return jnp.where(replica < num_replicas[:, None], physical_ids, -1), num_replicas


@jax.jit
def _to_physical(ids: jax.Array, physical_ids: jax.Array, num_replicas: jax.Array, first_token: jax.Array) -> jax.Array:
    ids, physical_ids, num_replicas = (clamp_to_int32(array) for array in (ids, physical_ids, num_replicas))
    num_experts, most = physical_ids.shape
    lead = ids.shape[:-1]
    # Without a sign, so that numbers of tokens beyond int32 go on.
    number = jnp.arange(math.prod(lead), dtype=jnp.uint32).reshape(lead)[..., None] + first_token.astype(jnp.uint32)
    known = (ids >= 0) & (ids < num_experts)
    expert = jnp.where(known, ids, 0)
    count = jnp.clip(num_replicas, 0, most)[expert]
    turn = number % jnp.maximum(count, 1).astype(jnp.uint32)
    physical = physical_ids[expert, turn.astype(jnp.int32)]
    return jnp.where(known & (count > 0), physical, -1)


@jax.jit
def _logical_load(load: jax.Array, physical_ids: jax.Array, num_replicas: jax.Array) -> jax.Array:
    physical_ids, num_replicas = clamp_to_int32(physical_ids), clamp_to_int32(num_replicas)
    num_physical = load.shape[-1]
    is_replica = jnp.arange(physical_ids.shape[1], dtype=jnp.int32)[None] < num_replicas[:, None]
    is_replica &= (physical_ids >= 0) & (physical_ids < num_physical)
    of_replicas = clamp_to_int32(load)[..., jnp.where(is_replica, physical_ids, 0)]
    is_replica = jnp.broadcast_to(is_replica, of_replicas.shape)
    return jnp.sum(jnp.where(is_replica, of_replicas, 0), axis=-1, dtype=jnp.int32)
