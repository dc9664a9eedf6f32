"""The primitive `moe_local`: the experts of one device, as the fused kernel on a GPU and as array code on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import PartitionSpec as P

from jax_megamoe import _compat, reference, xla_flags
from jax_megamoe.activations import SILU, Activation
from jax_megamoe.errors import PlatformError
from jax_megamoe.operands import Operands
from jax_megamoe.primitives import _library
from jax_megamoe.primitives import _transforms as transforms
from jax_megamoe.primitives._kernel_call import call_kernel, sizes_of

moe_local_p = Primitive("jax_megamoe.moe_local")
moe_local_p.multiple_results = True


def moe_local(
    operands: Operands,
    *,
    activation: Activation = SILU,
    routed_scaling_factor: float = 1.0,
    out_dtype: Any = jnp.bfloat16,
    batch_invariant: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The operands and results of `reference.moe_local`, on the platform the program is lowered for.

    x bf16[T, H], packed leaves, topk_ids int32[T, k] (local ids), topk_weights f32[T, k], layer int32[] ->
    y out_dtype[T, H], load int32[E_local].
    """
    y, load = moe_local_p.bind(
        *_compat.align_varying(operands.row),
        activation=activation,
        routed_scaling_factor=float(routed_scaling_factor),
        out_dtype=jnp.dtype(out_dtype),
        batch_invariant=batch_invariant,
        implementation=implementation,
    )
    return y, load


def _abstract_eval(*avals: Any, out_dtype: Any, **_: Any) -> tuple[Any, Any]:
    _compat.check_varying(moe_local_p.name, *avals)
    operands = Operands.of(avals)
    return (
        _compat.output_aval(operands.x, operands.x.shape, out_dtype, P(None, None)),
        _compat.output_aval(operands.x, (operands.num_local_experts,), jnp.int32, P(None)),
    )


def _batch(row: tuple[Any, ...], dims: tuple[Any, ...], **params: Any) -> tuple[tuple[Any, Any], tuple[int, int]]:
    batched = transforms.move_mapped_axis_to_front(Operands.of(row), Operands.of(dims))
    y, load = moe_local_p.bind(*batched.map_tokens(transforms.join_leading_dimensions).row, **params)
    loads = transforms.load_per_element(batched.topk_ids, load.shape[0])
    return (y.reshape(batched.x.shape), loads), (0, 0)


def _lower_cuda(ctx: Any, *row: Any, implementation: str | None, **params: Any) -> Any:
    if implementation == "reference":
        return _lower_reference(ctx, *row, **params)
    _library.check_kernel_available()
    xla_flags.hint_at_flags()
    return mlir.lower_fun(_call_kernel, multiple_results=True)(ctx, *row, **params)


def _lower_cpu(ctx: Any, *row: Any, implementation: str | None, **params: Any) -> Any:
    if implementation == "cuda":
        raise PlatformError(
            "implementation is 'cuda' on a CPU, wanted None, 'collective' or 'reference' there: "
            "leave it out, or run on a Hopper GPU."
        )
    return _lower_reference(ctx, *row, **params)


def _lower_elsewhere(ctx: Any, *row: Any, implementation: str | None, **params: Any) -> Any:
    if implementation == "reference":
        return _lower_reference(ctx, *row, **params)
    platforms = ctx.platforms or ctx.module_context.platforms
    raise PlatformError(
        f"the platform is {', '.join(platforms)}, wanted cuda or cpu: pass implementation='reference' elsewhere."
    )


def _lower_reference(ctx: Any, *row: Any, **params: Any) -> Any:
    return mlir.lower_fun(_call_reference, multiple_results=True)(ctx, *row, **params)


def _call_reference(*row: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array]:
    return reference.moe_local(Operands.of(row), **params)


def _call_kernel(*row: jax.Array, out_dtype: Any, batch_invariant: bool, **params: Any) -> tuple[jax.Array, jax.Array]:
    operands = Operands.of(row)
    sizes = sizes_of(operands, batch_invariant)
    if sizes.num_tokens == 0:
        return jnp.zeros(operands.x.shape, out_dtype), jnp.zeros(sizes.num_local_experts, jnp.int32)
    return call_kernel(
        _library.MOE_TARGET,
        operands,
        workspace_bytes=_library.workspace_bytes(sizes),
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
        **params,
    )


moe_local_p.def_impl(lambda *row, **params: xla.apply_primitive(moe_local_p, *row, **params))
moe_local_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[moe_local_p] = _batch
ad.primitive_jvps[moe_local_p] = transforms.refuse_differentiation
ad.primitive_transposes[moe_local_p] = transforms.refuse_differentiation
mlir.register_lowering(moe_local_p, _lower_elsewhere)
mlir.register_lowering(moe_local_p, _lower_cuda, platform="cuda")
mlir.register_lowering(moe_local_p, _lower_cpu, platform="cpu")
