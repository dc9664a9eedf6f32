"""The primitive `route`: a router's selection as one kernel, on one Hopper GPU or on each in `shard_map`.

Where the kernel cannot be had the primitive is array code, or an error if it was asked for by name.
"""

import functools
import math
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla
from jax.sharding import PartitionSpec as P

from jax_megamoe import _compat
from jax_megamoe.arrays import Array
from jax_megamoe.errors import MegaMoEError, PlatformError, ShapeError, ShardingError
from jax_megamoe.primitives import _library
from jax_megamoe.routing_arrays import GroupScoring, Scoring, route_arrays

MAX_EXPERTS, MAX_TOP_K = 1024, 32  # of the kernel
MOST_TOKENS = 512  # for which it is the default: so far it has been measured
SCORINGS: tuple[Scoring, ...] = get_args(Scoring)  # in the order of `Scoring` in cuda/router/route.h

route_p = Primitive("jax_megamoe.route")
route_p.multiple_results = True


class RouteParams(NamedTuple):
    """Arguments of `jax_megamoe.route` that are no arrays."""

    top_k: int
    scoring: Scoring
    num_groups: int
    top_groups: int
    group_scoring: GroupScoring
    renormalize: bool


def serves_by_default(logits: Array, params: RouteParams) -> bool:
    """Whether the kernel is what route uses of itself, as far as sizes say."""
    if any(export.is_symbolic_dim(size) for size in logits.shape):
        return False
    num_tokens = math.prod(logits.shape[:-1])
    return num_tokens <= MOST_TOKENS and logits.shape[-1] <= MAX_EXPERTS and params.top_k <= MAX_TOP_K


def check_served(logits: Array, params: RouteParams) -> None:
    """Raises `ShapeError` for sizes that the kernel does not compute."""
    num_experts = logits.shape[-1]
    if any(export.is_symbolic_dim(size) for size in logits.shape) or num_experts > MAX_EXPERTS:
        raise ShapeError(
            f"logits has shape {logits.shape} and implementation is 'cuda', wanted known sizes and at most "
            f"{MAX_EXPERTS} experts: leave implementation out."
        )
    if params.top_k > MAX_TOP_K:
        raise ShapeError(
            f"top_k is {params.top_k} and implementation is 'cuda', wanted at most {MAX_TOP_K}: "
            "leave implementation out."
        )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def route_by_kernel(
    logits: jax.Array, bias: jax.Array | None, params: RouteParams, is_required: bool
) -> tuple[jax.Array, jax.Array]:
    """Logits float [..., E], bias [E] -> ids int32[..., k], weights f32[..., k], as `route_arrays`.

    Derivatives are those of array code. `is_required`: an error instead of array code, where there is no kernel.
    """
    none = jnp.zeros(0, jnp.float32)
    row = logits.astype(jnp.float32), none if bias is None else bias.astype(jnp.float32)
    ids, weights = route_p.bind(*_compat.align_varying(row), params=params, is_required=is_required)
    return ids, weights


@route_by_kernel.defjvp
def _(params: RouteParams, is_required: bool, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(_arrays, params=params), primals, tangents)


def _arrays(logits: jax.Array, bias: jax.Array | None, *, params: RouteParams) -> tuple[jax.Array, jax.Array]:
    """The operands, or the arguments of `route_by_kernel`: no bias is one of size 0, or None."""
    bias = bias if bias is not None and bias.size else None
    return route_arrays(logits, bias, None, None, None, None, **params._asdict())


def _kernel(logits: jax.Array, bias: jax.Array, *, params: RouteParams) -> tuple[jax.Array, jax.Array]:
    *lead, num_experts = logits.shape
    shape = math.prod(lead), params.top_k
    results = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    ids, weights = jax.ffi.ffi_call(_library.ROUTE_TARGET, results)(
        logits.reshape(shape[0], num_experts),
        bias,
        scoring=np.int64(SCORINGS.index(params.scoring)),
        num_groups=np.int64(params.num_groups),
        top_groups=np.int64(params.top_groups),
        sums_two=np.int64(params.group_scoring == "sum_of_two"),
        renormalize=np.int64(params.renormalize),
    )
    return ids.reshape(*lead, params.top_k), weights.reshape(*lead, params.top_k)


def _abstract_eval(logits: Any, bias: Any, *, params: RouteParams, is_required: bool) -> tuple[Any, Any]:
    _compat.check_varying(route_p.name, logits, bias)
    shape, spec = (*logits.shape[:-1], params.top_k), P(*(None,) * logits.ndim)
    ids, weights = (_compat.output_aval(logits, shape, dtype, spec) for dtype in (jnp.int32, jnp.float32))
    return ids, weights


def _batch(
    row: tuple[Any, Any], dims: tuple[Any, Any], *, params: RouteParams, is_required: bool
) -> tuple[Any, tuple[int, int]]:
    (logits, bias), (dim, dim_of_bias) = row, dims
    if dim_of_bias is not None and not is_required:
        return jax.vmap(functools.partial(_arrays, params=params), in_axes=dims)(logits, bias), (0, 0)
    if dim_of_bias is not None:
        raise NotImplementedError(
            "bias is mapped by jax.vmap, and route with implementation='cuda' maps over tokens only: "
            "leave implementation out."
        )
    logits = jnp.moveaxis(logits, dim, 0)
    return route_p.bind(logits, bias, params=params, is_required=is_required), (0, 0)


def _lower_cuda(ctx: Any, *row: Any, params: RouteParams, is_required: bool) -> Any:
    if is_required:
        _check_program(ctx)
    lower = mlir.lower_fun(_kernel, multiple_results=True) if is_required or _can_have_kernel(ctx) else _lower_arrays
    return lower(ctx, *row, params=params)


def _can_have_kernel(ctx: Any) -> bool:
    if _compat.is_exported(ctx):
        return False  # An exported program should need no promise about custom calls that nobody asked for.
    try:
        _check_program(ctx)
    except MegaMoEError:
        return False
    return True


def _check_program(ctx: Any) -> None:
    """Raises where the program that is lowered cannot have the kernel."""
    _library.check_kernel_available()
    if (num_devices := _compat.num_devices_of_program(ctx)) not in (None, 1):
        raise ShardingError(
            f"implementation of route is 'cuda' in a program of {num_devices} devices, which XLA would have to split, "
            "wanted one device or jax.shard_map: call it there, or leave implementation out."
        )


_lower_arrays = mlir.lower_fun(_arrays, multiple_results=True)


def _lower_elsewhere(ctx: Any, *row: Any, params: RouteParams, is_required: bool) -> Any:
    if not is_required:
        return _lower_arrays(ctx, *row, params=params)
    platforms = ctx.platforms or ctx.module_context.platforms
    raise PlatformError(
        f"implementation of route is 'cuda' on {', '.join(platforms)}, wanted a Hopper GPU: leave implementation out."
    )


route_p.def_impl(lambda *row, **params: xla.apply_primitive(route_p, *row, **params))
route_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[route_p] = _batch
mlir.register_lowering(route_p, _lower_elsewhere)
mlir.register_lowering(route_p, _lower_cuda, platform="cuda")
