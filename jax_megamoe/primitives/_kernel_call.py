"""The FFI call of the fused kernel, which has the same operands and results on one device and on those of a group."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe import weight_layout
from jax_megamoe.primitives import _transforms as transforms


class Sizes(NamedTuple):
    """What the memory of a call follows from."""

    num_tokens: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_local_experts: int


def sizes_of(*operands: Any) -> Sizes:
    """The sizes of a call with these operands, arrays or their types."""
    x, gate_up, topk_ids = operands[0], operands[transforms.WEIGHTS[0]], operands[transforms.TOPK_IDS]
    num_local_experts, num_tiles = gate_up.shape[-4:-2]
    return Sizes(x.shape[0], topk_ids.shape[1], x.shape[1], num_tiles * weight_layout.PLANE_ROWS, num_local_experts)


def call_kernel(
    target: str,
    *operands: jax.Array,
    workspace_bytes: int,
    out_dtype: Any,
    activation_clamp: float,
    routed_scaling_factor: float,
    **attributes: Any,
) -> tuple[jax.Array, jax.Array]:
    """The call, for at least one token.

    Operands x bf16[T, H], four packed leaves of E_local experts, topk_ids int32[T, k], topk_weights f32[T, k], layer
    int32[], for a group also mesh_rank int32[] -> y out_dtype[T, H], load int32[E_local]. `attributes` are what the
    target wants to know beside the numerics.
    """
    sizes = sizes_of(*operands)
    results = (
        jax.ShapeDtypeStruct((sizes.num_tokens, sizes.hidden_size), out_dtype),
        jax.ShapeDtypeStruct((sizes.num_local_experts,), jnp.int32),
        # A result and no allocation of the handler's own, so that the call can be captured in a CUDA graph.
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    y, load, _ = jax.ffi.ffi_call(target, results)(
        *operands,
        activation_clamp=np.float32(activation_clamp),
        routed_scaling_factor=np.float32(routed_scaling_factor),
        **attributes,
    )
    return y, load
