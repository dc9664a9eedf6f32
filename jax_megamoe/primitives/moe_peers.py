"""The primitive `moe_peers`: the experts of all ranks of a group, as one fused kernel on each GPU where that can be.

What it is lowered to is chosen for each platform, and not while tracing, when nobody knows the platform: the fused
kernel for GPUs that reach each other's memory, and XLA's collectives around the experts of one device for everything
else. A program that is lowered for one platform has no trace of the other. Each call is lowered by itself, as
`moe_peers_call`, so that it has an identity by which ranks that are in different calls find out.
"""

import functools
import logging
import math
import os
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import PartitionSpec as P

from jax_megamoe import _compat, collectives, xla_flags
from jax_megamoe.activations import SILU, Activation
from jax_megamoe.errors import ArgumentError, GroupError
from jax_megamoe.operands import Operands
from jax_megamoe.primitives import _groups, _library, _reachability
from jax_megamoe.primitives import _transforms as transforms
from jax_megamoe.primitives._kernel_call import call_kernel, sizes_of
from jax_megamoe.primitives._specs import axes_text
from jax_megamoe.primitives.moe_local import moe_local

TIMEOUT_VARIABLE, _DEFAULT_TIMEOUT_SECONDS = "JAX_MEGAMOE_TIMEOUT_SECONDS", 30.0
SETUP_TIMEOUT_VARIABLE, _DEFAULT_SETUP_TIMEOUT_SECONDS = "JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS", 120.0

_log = logging.getLogger("jax_megamoe")

moe_peers_p, moe_peers_call_p = Primitive("jax_megamoe.moe_peers"), Primitive("jax_megamoe.moe_peers_call")
moe_peers_p.multiple_results = moe_peers_call_p.multiple_results = True


def timeout_from_environment() -> int:
    """How long the fused kernel may wait for another rank; raises `ArgumentError` for a variable that says nonsense."""
    return _microseconds_of(TIMEOUT_VARIABLE, _DEFAULT_TIMEOUT_SECONDS)


def setup_timeout_from_environment() -> int:
    """How long ranks may be apart when their group is set up, and in a call's first launch; raises like the other."""
    return _microseconds_of(SETUP_TIMEOUT_VARIABLE, _DEFAULT_SETUP_TIMEOUT_SECONDS)


def _microseconds_of(variable: str, default_seconds: float) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return round(default_seconds * 1e6)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    # More than a day is a mistake in the unit.
    if not 1e-3 <= seconds <= 86400:
        raise ArgumentError(
            f"{variable} is {text!r}, wanted a number of seconds from 0.001 to 86400: unset it for {default_seconds:g}."
        )
    return round(seconds * 1e6)


def moe_peers(
    operands: Operands,
    *,
    axis_sizes: Mapping[str, int],
    expert_axes: tuple[str, ...],
    gathered_axes: tuple[str, ...],
    timeout_microseconds: int,
    setup_timeout_microseconds: int,
    activation: Activation = SILU,
    routed_scaling_factor: float = 1.0,
    batch_invariant: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The operands and results of `collectives.through_collectives`, inside a region where all mesh axes are manual.

    x bf16[T, H], leaves of E_local experts, topk_ids int32[T, k] (global), topk_weights f32[T, k], layer int32[] ->
    y bf16[T, H], load int32[E_local] of all tokens along `expert_axes`. `axis_sizes` are those of the whole mesh, in
    its order. `implementation` is None, or "cuda" for an error instead of collectives.
    """
    y, load = moe_peers_p.bind(
        *_compat.align_varying(operands.row),
        axis_sizes=tuple(axis_sizes.items()),
        expert_axes=expert_axes,
        gathered_axes=gathered_axes,
        timeout_microseconds=timeout_microseconds,
        setup_timeout_microseconds=setup_timeout_microseconds,
        activation=activation,
        routed_scaling_factor=float(routed_scaling_factor),
        batch_invariant=batch_invariant,
        implementation=implementation,
    )
    return y, load


def _abstract_eval(
    *avals: Any, expert_axes: tuple[str, ...], gathered_axes: tuple[str, ...], **_: Any
) -> tuple[Any, Any]:
    _compat.check_varying(moe_peers_p.name, *avals)
    operands = Operands.of(avals)
    y = _compat.output_aval(operands.x, operands.x.shape, jnp.bfloat16, P(None, None))
    # Ranks with the same tokens get the same results.
    return (
        _compat.without_varying(y, frozenset(expert_axes) - frozenset(gathered_axes)),
        _compat.output_aval(operands.x, (operands.num_local_experts,), jnp.int32, P(None)),
    )


def _batch(row: tuple[Any, ...], dims: tuple[Any, ...], **params: Any) -> tuple[tuple[Any, Any], tuple[int, int]]:
    batched = transforms.move_mapped_axis_to_front(Operands.of(row), Operands.of(dims))
    y, load = moe_peers_p.bind(*batched.map_tokens(transforms.join_leading_dimensions).row, **params)
    # Of each element the load that the tokens of all ranks make, for this rank's experts.
    expert_axes, gathered_axes, num_local_experts = params["expert_axes"], params["gathered_axes"], load.shape[0]
    loads = transforms.load_per_element(batched.topk_ids, num_local_experts * jax.lax.axis_size(expert_axes))
    if gathered_axes:
        loads = jax.lax.psum(loads, gathered_axes)
    first = jax.lax.axis_index(expert_axes) * num_local_experts
    loads = jax.lax.dynamic_slice_in_dim(loads, first, num_local_experts, 1)
    return (y.reshape(batched.x.shape), loads), (0, 0)


def _lower(ctx: Any, *row: Any, **params: Any) -> Any:
    """The same with a `site` of its own, which no other call has: JAX takes no lowering again for an equal call."""
    # Not by `cacheable=False` for moe_peers_call_p: JAX fails then where platforms have different transforms.
    return mlir.lower_fun(functools.partial(moe_peers_call_p.bind, site=object()))(ctx, *row, **params)


def _lower_cuda(ctx: Any, *row: Any, site: object, **params: Any) -> Any:
    _library.check_kernel_available()
    xla_flags.hint_at_flags()
    reason = _reason_for_collectives(_compat.devices_of_program(ctx), Operands.of(ctx.avals_in), **params)
    if reason is None:
        call_id = zlib.crc32(_compat.call_site(ctx).encode())
        return mlir.lower_fun(_call_kernel, multiple_results=True)(ctx, *row, call_id=call_id, **params)
    if params["implementation"] == "cuda":
        raise GroupError(
            f"implementation is 'cuda' and {reason}, wanted ranks that one kernel serves: "
            "pass None or 'collective' for XLA's collectives around the kernel of one device."
        )
    _log_once(reason)
    return _lower_collectives(ctx, *row, site=site, **params)


def _reason_for_collectives(
    devices: tuple[Any, ...] | None,
    operands: Operands,
    *,
    axis_sizes: Any,
    expert_axes: tuple[str, ...],
    gathered_axes: tuple[str, ...],
    batch_invariant: bool,
    **_: Any,
) -> str | None:
    """Why GPUs can't run the fused kernel over this group; the same in every process, as it has to be."""
    if same := tuple(axis for axis in expert_axes if axis not in gathered_axes):
        return f"the tokens are not split over {axes_text(same)}, of the axes {axes_text(expert_axes)} of the experts"
    try:
        _workspace_bytes(operands, batch_invariant, axis_sizes=axis_sizes, expert_axes=expert_axes)
    except _library.UnservedError as error:  # too many ranks or experts
        return error.reason
    return _reachability.reason_for_collectives(devices, dict(axis_sizes), expert_axes)


def _workspace_bytes(
    operands: Operands, batch_invariant: bool, *, axis_sizes: Any, expert_axes: tuple[str, ...]
) -> int:
    num_ranks = math.prod(dict(axis_sizes)[axis] for axis in expert_axes)
    return _library.peer_workspace_bytes(sizes_of(operands, batch_invariant), num_ranks)


@functools.cache
def _log_once(reason: str) -> None:
    _log.warning("implementation='collective' is used instead of the fused kernel across ranks: %s.", reason)


def _lower_collectives(ctx: Any, *row: Any, site: object, **params: Any) -> Any:
    return mlir.lower_fun(_through_collectives, multiple_results=True)(ctx, *row, **params)


def _through_collectives(
    *row: jax.Array,
    axis_sizes: Any,
    timeout_microseconds: int,
    setup_timeout_microseconds: int,
    implementation: str | None,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    local_op = functools.partial(moe_local, implementation=implementation)
    return collectives.through_collectives(Operands.of(row), local_op, **params)


def _call_kernel(
    *row: jax.Array,
    axis_sizes: tuple[tuple[str, int], ...],
    expert_axes: tuple[str, ...],
    gathered_axes: tuple[str, ...],
    timeout_microseconds: int,
    setup_timeout_microseconds: int,
    call_id: int,
    batch_invariant: bool,
    implementation: str | None,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    operands = Operands.of(row)
    # Compared with the communicator's rank: a wrong order would give tokens to the wrong experts.
    mesh_rank = jax.lax.axis_index(expert_axes)
    return call_kernel(
        _library.MOE_PEERS_TARGET,
        operands,
        mesh_rank,
        workspace_bytes=_workspace_bytes(operands, batch_invariant, axis_sizes=axis_sizes, expert_axes=expert_axes),
        out_dtype=jnp.bfloat16,
        batch_invariant=batch_invariant,
        timeout_microseconds=np.int64(timeout_microseconds),
        setup_timeout_microseconds=np.int64(setup_timeout_microseconds),
        call_id=np.int64(call_id),
        **_groups.group_attributes(dict(axis_sizes), expert_axes),
        **params,
    )


moe_peers_p.def_impl(lambda *row, **params: xla.apply_primitive(moe_peers_p, *row, **params))
for primitive in (moe_peers_p, moe_peers_call_p):
    primitive.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[moe_peers_p] = _batch
ad.primitive_jvps[moe_peers_p] = transforms.refuse_differentiation
ad.primitive_transposes[moe_peers_p] = transforms.refuse_differentiation
mlir.register_lowering(moe_peers_p, _lower, cacheable=False)
mlir.register_lowering(moe_peers_call_p, _lower_collectives)
mlir.register_lowering(moe_peers_call_p, _lower_cuda, platform="cuda")
