"""The expert layer of a mixture-of-experts model as one fused FP8 kernel, callable inside `jax.jit`."""

import importlib.metadata

from jax_megamoe import errors, expert_parallel, reference
from jax_megamoe.activations import SiTU, SwiGLU
from jax_megamoe.api import moe
from jax_megamoe.checkpoints import load_experts, read_checkpoint
from jax_megamoe.export import DISABLE_JAX_EXPORT_CHECKS
from jax_megamoe.packing import pack_experts, quantize_experts, stack_experts
from jax_megamoe.replicas import logical_load, replica_map, to_physical
from jax_megamoe.routing import route
from jax_megamoe.take_experts import take_experts
from jax_megamoe.weights import ExpertWeights
from jax_megamoe.xla_flags import recommended_xla_flags

try:
    __version__ = importlib.metadata.version("jax_megamoe")
except importlib.metadata.PackageNotFoundError:  # A checkout that is not installed.
    __version__ = "0+unknown"

__all__ = [
    "DISABLE_JAX_EXPORT_CHECKS",
    "ExpertWeights",
    "SiTU",
    "SwiGLU",
    "errors",
    "expert_parallel",
    "load_experts",
    "logical_load",
    "moe",
    "pack_experts",
    "quantize_experts",
    "read_checkpoint",
    "recommended_xla_flags",
    "reference",
    "replica_map",
    "route",
    "stack_experts",
    "take_experts",
    "to_physical",
]
