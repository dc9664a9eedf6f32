"""The FFI call of the fused kernel, which has the same operands and results on one device and on those of a group."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import weight_layout
from jax_megamoe.activations import Activation
from jax_megamoe.operands import Operands, Sizes


def sizes_of(operands: Operands, batch_invariant: bool) -> Sizes:
    """The sizes of a call with these operands, arrays or their types, of one device."""
    (num_tokens, hidden_size), top_k = operands.x.shape, operands.topk_ids.shape[1]
    intermediate_size = operands.leaves.gate_up.shape[-3] * weight_layout.PLANE_ROWS
    weight_format = weight_layout.format_of(operands.leaves)
    num_local_experts = operands.num_local_experts
    return Sizes(num_tokens, top_k, hidden_size, intermediate_size, num_local_experts, weight_format, batch_invariant)


def call_kernel(
    target: str,
    operands: Operands,
    *more: jax.Array,
    workspace_bytes: int,
    out_dtype: Any,
    activation: Activation,
    routed_scaling_factor: float,
    batch_invariant: bool,
    **attributes: Any,
) -> tuple[jax.Array, jax.Array]:
    """The call, for at least one token.

    Operands x bf16[T, H], packed leaves of E_local experts, topk_ids int32[T, k], topk_weights f32[T, k], layer
    int32[]; `more` is for a group mesh_rank int32[] -> y out_dtype[T, H], load int32[E_local]. `attributes` are what
    the target wants to know beside the numerics.
    """
    sizes = sizes_of(operands, batch_invariant)
    results = (
        jax.ShapeDtypeStruct((sizes.num_tokens, sizes.hidden_size), out_dtype),
        jax.ShapeDtypeStruct((sizes.num_local_experts,), jnp.int32),
        # A result and no allocation of the handler's own, so that the call can be captured in a CUDA graph.
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    y, load, _ = jax.ffi.ffi_call(target, results)(
        *operands.row,
        *more,
        activation_clamp=np.float32(activation.clamp),
        activation_alpha=np.float32(activation.alpha),
        activation_up_offset=np.float32(activation.up_offset),
        situ_beta=np.float32(activation.beta),
        situ_linear_beta=np.float32(activation.linear_beta),
        routed_scaling_factor=np.float32(routed_scaling_factor),
        batch_invariant=np.int64(batch_invariant),
        **attributes,
    )
    return y, load
