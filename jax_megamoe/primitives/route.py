"""The primitive `route`: a router's selection as one kernel on a GPU, and as array code everywhere else."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla
from jax.sharding import PartitionSpec as P

from jax_megamoe import _compat
from jax_megamoe.errors import PlatformError
from jax_megamoe.primitives import _library
from jax_megamoe.routing_arrays import GroupScoring, Scoring, route_arrays

MAX_EXPERTS, MAX_TOP_K = 1024, 32  # of the kernel
_SCORINGS: tuple[Scoring, ...] = ("softmax", "sigmoid", "sqrtsoftplus")  # in the kernel's order

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


def serves(logits: jax.Array, params: RouteParams) -> bool:
    """Whether the kernel computes a selection of these sizes."""
    is_known = not any(export.is_symbolic_dim(size) for size in logits.shape)
    return is_known and logits.shape[-1] <= MAX_EXPERTS and params.top_k <= MAX_TOP_K


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def route_by_platform(logits: jax.Array, bias: jax.Array | None, params: RouteParams) -> tuple[jax.Array, jax.Array]:
    """Logits float [..., E], bias [E] -> ids int32[..., k], weights f32[..., k], as `route_arrays`.

    By a kernel where the program is lowered for one Hopper GPU, or in `shard_map`; derivatives are those of array code.
    """
    none = jnp.zeros(0, jnp.float32)
    row = logits.astype(jnp.float32), none if bias is None else bias.astype(jnp.float32)
    ids, weights = route_p.bind(*_compat.align_varying(row), params=params)
    return ids, weights


@route_by_platform.defjvp
def _(params: RouteParams, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(_arrays, params=params), primals, tangents)


def _arrays(logits: jax.Array, bias: jax.Array | None, *, params: RouteParams) -> tuple[jax.Array, jax.Array]:
    bias = None if bias is None or bias.size == 0 else bias
    return route_arrays(logits, bias, None, None, None, None, **params._asdict())


def _kernel(logits: jax.Array, bias: jax.Array, *, params: RouteParams) -> tuple[jax.Array, jax.Array]:
    *lead, num_experts = logits.shape
    shape = math.prod(lead), params.top_k
    results = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    ids, weights = jax.ffi.ffi_call(_library.ROUTE_TARGET, results)(
        logits.reshape(shape[0], num_experts),
        bias,
        scoring=np.int64(_SCORINGS.index(params.scoring)),
        num_groups=np.int64(params.num_groups),
        top_groups=np.int64(params.top_groups),
        sums_two=np.int64(params.group_scoring == "sum_of_two"),
        renormalize=np.int64(params.renormalize),
    )
    return ids.reshape(*lead, params.top_k), weights.reshape(*lead, params.top_k)


def _abstract_eval(logits: Any, bias: Any, *, params: RouteParams) -> tuple[Any, Any]:
    _compat.check_varying(route_p.name, logits, bias)
    shape, spec = (*logits.shape[:-1], params.top_k), P(*(None,) * logits.ndim)
    ids, weights = (_compat.output_aval(logits, shape, dtype, spec) for dtype in (jnp.int32, jnp.float32))
    return ids, weights


def _batch(row: tuple[Any, Any], dims: tuple[Any, Any], *, params: RouteParams) -> tuple[Any, tuple[int, int]]:
    (logits, bias), (dim, dim_of_bias) = row, dims
    if dim_of_bias is not None:
        return jax.vmap(functools.partial(_arrays, params=params), in_axes=dims)(logits, bias), (0, 0)
    return route_p.bind(jnp.moveaxis(logits, dim, 0), bias, params=params), (0, 0)


def _lower_cuda(ctx: Any, *row: Any, params: RouteParams) -> Any:
    # XLA cannot split the kernel: a program of several devices keeps array code, which it does split.
    is_split = _compat.num_devices_of_program(ctx) not in (None, 1)
    function = _arrays if is_split or not _has_kernel() else _kernel
    return mlir.lower_fun(function, multiple_results=True)(ctx, *row, params=params)


def _has_kernel() -> bool:
    try:
        _library.check_kernel_available()
    except PlatformError:
        return False
    return True


route_p.def_impl(lambda *row, **params: xla.apply_primitive(route_p, *row, **params))
route_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[route_p] = _batch
mlir.register_lowering(route_p, mlir.lower_fun(_arrays, multiple_results=True))
mlir.register_lowering(route_p, _lower_cuda, platform="cuda")
