"""The primitive `moe_local`: the experts of one device, as the fused kernel on a GPU and as array code on a CPU."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import PartitionSpec as P

from jax_megamoe import _compat, reference
from jax_megamoe.errors import MegaMoEError
from jax_megamoe.primitives import _library
from jax_megamoe.primitives import _transforms as transforms
from jax_megamoe.primitives._kernel_call import call_kernel, sizes_of

moe_local_p = Primitive("jax_megamoe.moe_local")
moe_local_p.multiple_results = True


def moe_local(
    x: jax.Array,
    gate_up: jax.Array,
    gate_up_scale: jax.Array,
    down: jax.Array,
    down_scale: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: jax.Array,
    *,
    activation_clamp: float = math.inf,
    routed_scaling_factor: float = 1.0,
    out_dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The operands and results of `reference.moe_local`, on the platform the program is lowered for.

    x bf16[T, H], packed leaves, topk_ids int32[T, k] (local ids), topk_weights f32[T, k], layer int32[] ->
    y out_dtype[T, H], load int32[E_local].
    """
    operands = (x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, layer)
    y, load = moe_local_p.bind(
        *_compat.align_varying(operands),
        activation_clamp=float(activation_clamp),
        routed_scaling_factor=float(routed_scaling_factor),
        out_dtype=jnp.dtype(out_dtype),
        implementation=implementation,
    )
    return y, load


def _abstract_eval(x: Any, gate_up: Any, *others: Any, out_dtype: Any, **_: Any) -> tuple[Any, Any]:
    _compat.check_varying(moe_local_p.name, x, gate_up, *others)
    num_local_experts = gate_up.shape[-4]
    return (
        _compat.output_aval(x, x.shape, out_dtype, P(None, None)),
        _compat.output_aval(x, (num_local_experts,), jnp.int32, P(None)),
    )


def _batch(operands: tuple[Any, ...], dims: tuple[Any, ...], **params: Any) -> tuple[tuple[Any, Any], tuple[int, int]]:
    batched = transforms.move_mapped_axis_to_front(operands, dims)
    x, topk_ids = batched[0], batched[transforms.TOPK_IDS]
    for i in transforms.TOKENS:
        batched[i] = batched[i].reshape(-1, batched[i].shape[-1])
    y, load = moe_local_p.bind(*batched, **params)
    return (y.reshape(x.shape), transforms.load_per_element(topk_ids, load.shape[0])), (0, 0)


def _lower_cuda(ctx: Any, *operands: Any, implementation: str | None, **params: Any) -> Any:
    if implementation == "reference":
        return _lower_reference(ctx, *operands, **params)
    _library.check_kernel_available()
    return mlir.lower_fun(_call_kernel, multiple_results=True)(ctx, *operands, **params)


def _lower_cpu(ctx: Any, *operands: Any, implementation: str | None, **params: Any) -> Any:
    if implementation == "cuda":
        raise MegaMoEError(
            "implementation is 'cuda' on a CPU, wanted None, 'collective' or 'reference' there: "
            "leave it out, or run on a Hopper GPU."
        )
    return _lower_reference(ctx, *operands, **params)


def _lower_elsewhere(ctx: Any, *operands: Any, implementation: str | None, **params: Any) -> Any:
    if implementation == "reference":
        return _lower_reference(ctx, *operands, **params)
    platforms = ctx.platforms or ctx.module_context.platforms
    raise MegaMoEError(
        f"the platform is {', '.join(platforms)}, wanted cuda or cpu: pass implementation='reference' elsewhere."
    )


def _lower_reference(ctx: Any, *operands: Any, **params: Any) -> Any:
    return mlir.lower_fun(reference.moe_local, multiple_results=True)(ctx, *operands, **params)


def _call_kernel(*operands: jax.Array, out_dtype: Any, **params: Any) -> tuple[jax.Array, jax.Array]:
    sizes = sizes_of(*operands)
    if sizes.num_tokens == 0:
        return jnp.zeros(operands[0].shape, out_dtype), jnp.zeros(sizes.num_local_experts, jnp.int32)
    return call_kernel(
        _library.MOE_TARGET,
        *operands,
        workspace_bytes=_library.workspace_bytes(*sizes),
        out_dtype=out_dtype,
        **params,
    )


moe_local_p.def_impl(lambda *operands, **params: xla.apply_primitive(moe_local_p, *operands, **params))
moe_local_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[moe_local_p] = _batch
ad.primitive_jvps[moe_local_p] = transforms.refuse_differentiation
ad.primitive_transposes[moe_local_p] = transforms.refuse_differentiation
mlir.register_lowering(moe_local_p, _lower_elsewhere)
mlir.register_lowering(moe_local_p, _lower_cuda, platform="cuda")
mlir.register_lowering(moe_local_p, _lower_cpu, platform="cpu")
