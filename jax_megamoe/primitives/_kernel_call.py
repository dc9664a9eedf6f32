"""The FFI call of the fused kernel, which has the same operands and results on one device and on those of a group."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import layout


def call_kernel(
    target: str,
    *operands: jax.Array,
    workspace_bytes: Callable[[int, int, int, int, int], int],
    out_dtype: Any,
    activation_clamp: float,
    routed_scaling_factor: float,
    has_side_effect: bool = False,
    **attributes: Any,
) -> tuple[jax.Array, jax.Array]:
    """The call, or zeros where there are no tokens.

    Operands x bf16[T, H], four packed leaves of E_local experts, topk_ids int32[T, k], topk_weights f32[T, k], layer
    int32[] -> y out_dtype[T, H], load int32[E_local].

    `workspace_bytes` tells from T, k, H, I and E_local how much scratch memory the call needs, and raises `ValueError`
    for sizes that the kernel does not serve. `attributes` are what the target wants to know beside the numerics.
    """
    x, gate_up, *_, topk_ids, _, _ = operands
    num_local_experts, num_tiles = gate_up.shape[-4:-2]
    (num_tokens, hidden_size), top_k = x.shape, topk_ids.shape[1]
    if num_tokens == 0:
        return jnp.zeros(x.shape, out_dtype), jnp.zeros(num_local_experts, jnp.int32)
    num_bytes = workspace_bytes(num_tokens, top_k, hidden_size, num_tiles * layout.PLANE_ROWS, num_local_experts)
    results = (
        jax.ShapeDtypeStruct(x.shape, out_dtype),
        jax.ShapeDtypeStruct((num_local_experts,), jnp.int32),
        # A result and no allocation of the handler's own, so that the call can be captured in a CUDA graph.
        jax.ShapeDtypeStruct((num_bytes,), jnp.uint8),
    )
    y, load, _ = jax.ffi.ffi_call(target, results, has_side_effect=has_side_effect)(
        *operands,
        activation_clamp=np.float32(activation_clamp),
        routed_scaling_factor=np.float32(routed_scaling_factor),
        **attributes,
    )
    return y, load
