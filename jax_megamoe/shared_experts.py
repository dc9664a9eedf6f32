"""Shared experts: those that every token goes through, beside the ones that it is routed to.

To the kernel they are S more experts of each device and S more slots of each token, which name the device's own: their
weights stream with the others', and no token travels for them. They come first, since they have the most tokens, and a
large part that is begun last is waited for. In the slots of a call, numbers below S are shared experts and routed ones
begin at S; on a device of a group these become the numbers of that device's own (`collectives.ids_in_group`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_megamoe import arguments, weight_layout
from jax_megamoe.arrays import Array, as_array, require_known_sizes, unwrap
from jax_megamoe.errors import ArgumentError, DTypeError, ShapeError
from jax_megamoe.operands import Operands
from jax_megamoe.padding import Call, with_padded_hidden
from jax_megamoe.primitives import _specs
from jax_megamoe.primitives._specs import Axes
from jax_megamoe.valid_tokens import ids_of_valid_tokens
from jax_megamoe.weights import ExpertWeights


class SharedExperts(NamedTuple):
    """Checked arguments `shared` and `shared_weights`."""

    weights: ExpertWeights  # S experts, all of them on each device
    scale: Array | None  # f32[..., S]; None for ones


def check(shared: Any, shared_weights: Any, x: jax.Array, weights: ExpertWeights) -> SharedExperts | None:
    """The arguments that `moe` goes on with, the others of which are checked; None without shared experts.

    Raises `ShapeError`, `DTypeError`, `LayoutError` or `ArgumentError`.
    """
    if shared is None:
        if shared_weights is not None:
            raise ArgumentError(
                "shared_weights is given and shared is None, wanted both or neither: pass the shared experts' weights."
            )
        return None
    checked = arguments.check_weights(unwrap(shared), "shared")
    sizes, wanted = ((w.hidden_size, w.intermediate_size) for w in (checked, weights))
    if sizes != wanted:
        raise ShapeError(
            f"shared has hidden and intermediate size {sizes}, wanted {wanted} like weights: compute them beside the "
            "layer, or, where only the latter differs, split or join them along it."
        )
    held, said = checked.gate_up.shape[-4], checked.num_experts
    if not 1 <= said <= arguments.MAX_TOP_K:
        raise ShapeError(
            f"shared has {said} experts, wanted 1 to {arguments.MAX_TOP_K}: leave it out where there are none."
        )
    if held != said:
        raise ShapeError(
            f"shared holds {held} of {said} experts, wanted all of them on each device: replicate them over the mesh."
        )
    layers, wanted_layers = (w.gate_up.shape[0] if w.is_stacked else None for w in (checked, weights))
    if layers != wanted_layers:
        raise ShapeError(
            f"shared is {_layers_text(layers)} and weights {_layers_text(wanted_layers)}, wanted both alike: "
            "pass the shared experts of the same layers."
        )
    if shared_weights is None:
        return SharedExperts(checked, None)
    scale = as_array("shared_weights", shared_weights, "an array of float32")
    require_known_sizes("shared_weights", scale)
    if scale.dtype != jnp.float32:
        raise DTypeError(f"shared_weights has dtype {scale.dtype}, wanted float32: cast it.")
    if scale.shape != (*x.shape[:-1], held):
        raise ShapeError(
            f"shared_weights has shape {scale.shape}, wanted {(*x.shape[:-1], held)} for x of shape {x.shape} and "
            f"{held} shared experts: reshape it."
        )
    return SharedExperts(checked, scale)


def _layers_text(layers: int | None) -> str:
    return "of one layer, not stacked" if layers is None else f"a stack of {layers}"


def arrays_by_name(shared: SharedExperts | None) -> dict[str, Any]:
    """What there is of them, by the names that messages have for it."""
    if shared is None:
        return {}
    arrays = {f"shared.{name}": leaf for name, leaf in shared.weights.leaves._asdict().items()}
    return arrays if shared.scale is None else {**arrays, "shared_weights": shared.scale}


def call_with_shared(
    call: Call,
    operands: Operands,
    shared: SharedExperts | None,
    *,
    axes: Axes,
    num_experts: int,
    num_valid_tokens: jax.Array | None,
    routed_scaling_factor: float,
) -> tuple[jax.Array, jax.Array]:
    """`call(operands, axes=, num_experts=, routed_scaling_factor=)`, with the shared experts' part in its y.

    In the same call where one kernel serves both; else in one more, whose result is added and rounded once more.
    """
    call = with_padded_hidden(call)
    routed = {"axes": axes, "num_experts": num_experts, "routed_scaling_factor": routed_scaling_factor}
    if shared is None:
        ids = ids_of_valid_tokens(operands.topk_ids, num_valid_tokens)
        return call(operands._replace(topk_ids=ids), **routed)
    slots = functools.partial(_slots_of, operands, shared, num_valid_tokens)
    leaves = shared.weights.leaves
    if _is_one_call(operands, shared):
        ids, weights = slots(num_experts=num_experts, factor=routed_scaling_factor)
        joined = operands._replace(topk_ids=ids, topk_weights=weights, shared=leaves)
        return call(joined, **{**routed, "routed_scaling_factor": 1.0})
    ids = ids_of_valid_tokens(operands.topk_ids, num_valid_tokens)
    y, load = call(operands._replace(topk_ids=ids), **routed)
    ids, weights = slots(num_experts=None)
    own, _ = call(
        operands._replace(leaves=leaves, topk_ids=ids, topk_weights=weights),
        axes=Axes((), axes.tokens),
        num_experts=shared.weights.num_experts,
        routed_scaling_factor=1.0,
    )
    return _specs.call_with_types(_add, {"y": y, "shared": own}, (P(*jax.typeof(y).sharding.spec),))[0], load


def _is_one_call(operands: Operands, shared: SharedExperts) -> bool:
    """Whether one kernel computes routed and shared experts."""
    num_slots = operands.topk_ids.shape[-1] + shared.weights.num_experts
    same_format = weight_layout.format_of(operands.leaves) == shared.weights.format
    return same_format and num_slots <= arguments.MAX_TOP_K


def _slots_of(
    operands: Operands, shared: SharedExperts, num_valid_tokens: jax.Array | None, **params: Any
) -> tuple[jax.Array, ...]:
    """`_slots` of arrays that may have explicit axes."""
    arrays = {
        "topk_ids": operands.topk_ids,
        "topk_weights": operands.topk_weights,
        "shared_weights": shared.scale,
        "num_valid_tokens": num_valid_tokens,
    }
    sharding = jax.typeof(operands.topk_ids).sharding
    spec = P(*sharding.spec, *(None,) * (operands.topk_ids.ndim - len(sharding.spec)))
    slots = functools.partial(_slots, num_shared=shared.weights.num_experts, **params)
    return _specs.call_with_types(slots, arrays, (spec, spec))


# Compiled, also where the caller's program is not: its constants would be transfers to the device.
@jax.jit(static_argnames=("num_shared", "num_experts", "factor"))
def _slots(
    ids: jax.Array,
    weights: jax.Array,
    scale: jax.Array | None,
    num_valid_tokens: jax.Array | None,
    *,
    num_shared: int,
    num_experts: int | None,
    factor: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Ids int32[..., S] and weights f32[..., S] of the shared experts; before them those of `num_experts` others.

    The others' ids begin at S, and `factor` is in their weights. Weights of unused slots, NaN among them, are zeros.
    """
    lead = (*ids.shape[:-1], num_shared)
    of_shared = jnp.broadcast_to(jnp.arange(num_shared, dtype=jnp.int32), lead)
    scale = jnp.ones(lead, jnp.float32) if scale is None else scale
    if num_experts is None:
        ids, weights = of_shared, scale
    else:
        ids = jnp.where((ids >= 0) & (ids < num_experts), ids + num_shared, -1)
        ids, weights = jnp.concatenate([ids, of_shared], -1), jnp.concatenate([weights, scale], -1)
        factors = np.concatenate([np.full(weights.shape[-1] - num_shared, factor), np.ones(num_shared)])
        factors = factors.astype(np.float32).reshape((1,) * (weights.ndim - 1) + factors.shape)
        weights = jnp.where(ids >= 0, weights, 0.0) * factors
    ids = ids_of_valid_tokens(ids, num_valid_tokens)
    return ids, jnp.where(ids >= 0, weights, 0.0)


@jax.jit
def _add(y: jax.Array, own: jax.Array) -> tuple[jax.Array]:
    return ((y.astype(jnp.float32) + own.astype(jnp.float32)).astype(y.dtype),)
