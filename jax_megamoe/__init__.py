"""The expert layer of a mixture-of-experts model as one fused FP8 kernel, callable inside `jax.jit`."""

from jax_megamoe import errors, reference
from jax_megamoe.api import moe
from jax_megamoe.routing import route
from jax_megamoe.weights import ExpertWeights, pack_experts, quantize_experts, stack_experts

__all__ = [
    "ExpertWeights",
    "errors",
    "moe",
    "pack_experts",
    "quantize_experts",
    "reference",
    "route",
    "stack_experts",
]
