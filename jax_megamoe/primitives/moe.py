"""The primitive `moe`, the global view: expands to a `shard_map` over all mesh axes around `moe_per_device`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_megamoe import _compat, collectives
from jax_megamoe.errors import ShardingError
from jax_megamoe.operands import Operands
from jax_megamoe.primitives import _specs
from jax_megamoe.primitives import _transforms as transforms
from jax_megamoe.primitives._specs import Axes
from jax_megamoe.primitives.moe_local import moe_local
from jax_megamoe.primitives.moe_peers import moe_peers, setup_timeout_from_environment, timeout_from_environment

moe_p = Primitive("jax_megamoe.moe")
moe_p.multiple_results = True


def moe(operands: Operands, *, mesh: AbstractMesh, axes: Axes, **params: Any) -> tuple[jax.Array, jax.Array]:
    """The layer, wherever it is called: in the global view, inside `shard_map`, or between, some axes being manual.

    x bf16[..., H], packed leaves, topk_ids int32[..., k], topk_weights f32[..., k], layer int32[] ->
    y bf16[..., H] typed like x, load int32[E], of which a device has the part that belongs to its experts.
    `mesh` may be empty: one device. `params` are num_experts, with_load, activation, routed_scaling_factor,
    batch_invariant, implementation; without `with_load`, load is of no use.
    """
    # Here, and not where it is used: that is while lowering, which JAX skips for a program that it knows.
    params["timeout_microseconds"] = timeout_from_environment()
    params["setup_timeout_microseconds"] = setup_timeout_from_environment()
    if not mesh.manual_axes:
        y, load = moe_p.bind(*operands.row, mesh=mesh, axes=axes, **params)
        return y, load
    # Array code from here on, with collectives of integers, which would pass on no derivative, and no error.
    operands = Operands.of([transforms.without_derivative(value) for value in operands.row])
    if set(mesh.manual_axes) == set(mesh.axis_names):
        return _per_device(operands, mesh=mesh, axes=axes, **params)
    # A region inside a region; JAX runs none outside of `jax.jit`. Each call has a function of its own: what is traced
    # once has one identity (moe_peers.py).
    y, load = jax.jit(functools.partial(_map_over_mesh, mesh=mesh, axes=axes, **params), inline=True)(operands)
    return y, load


def _abstract_eval(*avals: Any, mesh: AbstractMesh, axes: Axes, num_experts: int, **_: Any) -> tuple[Any, Any]:
    operands = Operands.of(avals)
    y, load = operands.x.update(weak_type=False), jax.core.ShapedArray((num_experts,), jnp.int32)
    if mesh.empty:
        return y, load
    specs = _specs.choose_specs(operands.x, operands.leaves, mesh, axes)
    explicit_axes = _specs.axes_of_type(mesh, AxisType.Explicit)
    y_spec, load_spec = (
        _specs.restrict(spec, explicit_axes, aval.ndim)
        for spec, aval in ((specs.token_spec(), y), (specs.load_spec(), load))
    )
    return y.update(sharding=NamedSharding(mesh, y_spec)), load.update(sharding=NamedSharding(mesh, load_spec))


def _batch(row: tuple[Any, ...], dims: tuple[Any, ...], **params: Any) -> tuple[tuple[Any, Any], tuple[int, int]]:
    # A mapped axis is one leading dimension more.
    batched = transforms.move_mapped_axis_to_front(Operands.of(row), Operands.of(dims))
    y, load = moe_p.bind(*batched.row, **{**params, "with_load": False})
    if params["with_load"]:
        # Numbers of routed experts begin behind those of shared ones.
        ids = batched.topk_ids - batched.num_shared_experts
        load_per_element = transforms.load_per_element(ids, params["num_experts"])
        load = _specs.reshard(load_per_element, params["mesh"], P(None, *jax.typeof(load).sharding.spec))
    else:
        load = jnp.broadcast_to(load, (y.shape[0], *load.shape))
    return (y, load), (0, 0)


def _lower(ctx: Any, *row: Any, mesh: AbstractMesh, **params: Any) -> Any:
    if not mesh.empty and _compat.num_devices_of_program(ctx) not in (None, mesh.size):
        raise ShardingError(
            f"weights or tokens in the closure of a program are on {mesh.size} devices, and nothing else tells it of "
            f"more than {_compat.num_devices_of_program(ctx)}: call it under jax.set_mesh(mesh), or pass them as "
            "arguments of jax.jit."
        )
    expand = _per_device if mesh.empty else _map_over_mesh

    def expand_row(*row: jax.Array) -> tuple[jax.Array, jax.Array]:
        return expand(Operands.of(row), mesh=mesh, **params)

    return mlir.lower_fun(expand_row, multiple_results=True)(ctx, *row)


def _map_over_mesh(operands: Operands, *, mesh: AbstractMesh, axes: Axes, **params: Any) -> tuple[jax.Array, jax.Array]:
    """`_per_device` on the devices of all axes that are not manual yet."""
    shape, num_tokens = operands.x.shape, math.prod(operands.x.shape[:-1])
    if not _specs.axes_of_type(mesh, AxisType.Explicit):
        # No types to keep to: one dimension of tokens, of a length that the axes divide.
        automatic = [axis for axis in axes.tokens if axis not in mesh.manual_axes]
        operands = _flatten(operands, -num_tokens % _specs.axes_size(mesh, automatic))

    types = Operands.of([jax.typeof(value) for value in operands.row])
    specs = _specs.choose_specs(types.x, types.leaves, mesh, axes)
    in_specs = specs.operand_specs(types).row
    row = tuple(_specs.reshard(value, mesh, spec) for value, spec in zip(operands.row, in_specs, strict=True))
    # Explicit types may say that the experts are not split.
    manual_axes = [axis for axis in axes.experts if axis in mesh.manual_axes]
    experts_over = tuple(axis for axis in axes.experts if axis in (*manual_axes, *specs.experts))
    tokens_over = (*(a for a in axes.tokens if a in mesh.manual_axes), *(a for dim in specs.tokens for a in dim))

    def per_device(*row: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _per_device(Operands.of(row), mesh=mesh, axes=Axes(experts_over, tokens_over), **params)

    y, load = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=(specs.token_spec(), specs.load_spec()),
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        # Inside a region that does not track what varies, a nested one cannot.
        check_vma=_compat.tracks_varying() or not mesh.manual_axes,
    )(*row)
    return (y if y.shape == shape else y[:num_tokens].reshape(shape)), load


def _per_device(
    operands: Operands,
    *,
    mesh: AbstractMesh,
    axes: Axes,
    implementation: str | None,
    timeout_microseconds: int,
    setup_timeout_microseconds: int,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    """One device's part, or all of it where there is no mesh."""
    local_op: collectives.Op = functools.partial(moe_local, implementation=implementation)
    group_op: collectives.Op = functools.partial(collectives.through_collectives, local_op=local_op)
    if implementation in (None, "cuda"):
        group_op = functools.partial(
            moe_peers,
            axis_sizes=mesh.shape,
            timeout_microseconds=timeout_microseconds,
            setup_timeout_microseconds=setup_timeout_microseconds,
            implementation=implementation,
        )
    y, load = collectives.moe_per_device(
        _flatten(operands),
        local_op,
        group_op,
        expert_axes=axes.experts,
        token_axes=axes.tokens,
        axis_sizes=mesh.shape,
        **params,
    )
    return y.reshape(operands.x.shape), load


def _flatten(operands: Operands, padding: int = 0) -> Operands:
    """Tokens in one dimension, and so many more of them that have no used slot."""
    flat = operands.map_tokens(transforms.join_leading_dimensions)
    if not padding:
        return flat
    x, ids, weights = (
        jnp.pad(value, ((0, padding), (0, 0)), constant_values=fill)
        for value, fill in ((flat.x, 0), (flat.topk_ids, -1), (flat.topk_weights, 0))
    )
    return flat._replace(x=x, topk_ids=ids, topk_weights=weights)


moe_p.def_impl(lambda *row, **params: xla.apply_primitive(moe_p, *row, **params))
moe_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[moe_p] = _batch
ad.primitive_jvps[moe_p] = transforms.refuse_differentiation
ad.primitive_transposes[moe_p] = transforms.refuse_differentiation
# Not cached: each call has an identity, moe_peers.py says what for.
mlir.register_lowering(moe_p, _lower, cacheable=False)
