"""Shared experts: those that every token goes through, beside the ones that it is routed to.

To the kernel they are S more experts of each device and S more slots of each token, which name the device's own: their
weights stream with the others', and no token travels for them. They come first, since they have the most tokens, and a
large part that is begun last is waited for. In the slots of a call, numbers below S are shared experts and routed ones
begin at S; on a device of a group these become the numbers of that device's own (`collectives.ids_in_group`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jax_megamoe import arguments, weight_layout
from jax_megamoe.arrays import Array, as_array, require_known_sizes, unwrap
from jax_megamoe.errors import ArgumentError, DTypeError, MegaMoEError, ShapeError
from jax_megamoe.operands import Operands
from jax_megamoe.primitives import _specs
from jax_megamoe.primitives._specs import Axes
from jax_megamoe.valid_tokens import ids_of_valid_tokens
from jax_megamoe.weights import ExpertWeights

Call = Callable[..., tuple[jax.Array, jax.Array]]


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
    try:
        checked = arguments.check_weights(unwrap(shared))
    except MegaMoEError as error:
        raise type(error)(f"shared: {error}") from None
    sizes, wanted = ((w.hidden_size, w.intermediate_size) for w in (checked, weights))
    if sizes != wanted:
        raise ShapeError(
            f"shared has hidden and intermediate size {sizes}, wanted {wanted} like weights: split or join the shared "
            "experts along their intermediate size, or compute them beside the layer."
        )
    held, said = checked.gate_up.shape[-4], checked.num_experts
    if held != said:
        raise ShapeError(
            f"shared holds {held} of {said} experts, wanted all of them on each device: replicate them over the mesh."
        )
    layers, wanted_layers = (w.gate_up.shape[0] if w.is_stacked else None for w in (checked, weights))
    if layers != wanted_layers:
        raise ShapeError(
            f"shared stacks {layers} layers, wanted {wanted_layers} like weights: "
            "pass the shared experts of the same layers, stacked alike."
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
    routed = {"axes": axes, "num_experts": num_experts, "routed_scaling_factor": routed_scaling_factor}
    if shared is None:
        ids = ids_of_valid_tokens(operands.topk_ids, num_valid_tokens)
        return call(operands._replace(topk_ids=ids), **routed)
    num_shared, top_k = shared.weights.num_experts, operands.topk_ids.shape[-1]
    if weight_layout.format_of(operands.leaves) == shared.weights.format and top_k + num_shared <= arguments.MAX_TOP_K:
        ids, weights = _with_shared_slots(operands, shared, num_experts, routed_scaling_factor)
        joined = operands._replace(
            topk_ids=ids_of_valid_tokens(ids, num_valid_tokens), topk_weights=weights, shared=shared.weights.leaves
        )
        return call(joined, **{**routed, "routed_scaling_factor": 1.0})
    y, load = call(
        operands._replace(topk_ids=ids_of_valid_tokens(operands.topk_ids, num_valid_tokens)),
        **routed,
    )
    ids, weights = _with_shared_slots(operands, shared, 0, 1.0)
    own, _ = call(
        operands._replace(
            leaves=shared.weights.leaves,
            topk_ids=ids_of_valid_tokens(ids[..., top_k:], num_valid_tokens),
            topk_weights=weights[..., top_k:],
        ),
        axes=Axes((), axes.tokens),
        num_experts=num_shared,
        routed_scaling_factor=1.0,
    )
    return _specs.call_with_types(_add, {"y": y, "shared": own}, (P(*jax.typeof(y).sharding.spec),))[0], load


def _with_shared_slots(
    operands: Operands, shared: SharedExperts, num_experts: int, routed_scaling_factor: float
) -> tuple[jax.Array, ...]:
    """Ids int32[..., k + S], those of shared experts last, and weights f32[..., k + S], the factor in the others'."""
    arrays = {"topk_ids": operands.topk_ids, "topk_weights": operands.topk_weights, "shared_weights": shared.scale}
    sharding = jax.typeof(operands.topk_ids).sharding

    def join(ids: jax.Array, weights: jax.Array, scale: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        return _join_slots(
            ids,
            weights,
            scale,
            num_experts=num_experts,
            num_shared=shared.weights.num_experts,
            factor=routed_scaling_factor,
        )

    spec = P(*sharding.spec, *(None,) * (operands.topk_ids.ndim - len(sharding.spec)))
    given = {name: array for name, array in arrays.items() if array is not None}
    return _specs.call_with_types(join, given, (spec, spec))


# Compiled, also where the caller's program is not: its constants would be transfers to the device.
@jax.jit(static_argnames=("num_experts", "num_shared", "factor"))
def _join_slots(
    ids: jax.Array, weights: jax.Array, scale: jax.Array | None, *, num_experts: int, num_shared: int, factor: float
) -> tuple[jax.Array, jax.Array]:
    lead = (*ids.shape[:-1], num_shared)
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids + num_shared, -1)
    numbers = jnp.broadcast_to(jnp.arange(num_shared, dtype=jnp.int32), lead)
    ones = jnp.ones(lead, jnp.float32) if scale is None else scale
    return jnp.concatenate([ids, numbers], -1), jnp.concatenate([weights * jnp.float32(factor), ones], -1)


@jax.jit
def _add(y: jax.Array, own: jax.Array) -> tuple[jax.Array]:
    return ((y.astype(jnp.float32) + own.astype(jnp.float32)).astype(y.dtype),)
