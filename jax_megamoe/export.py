"""What `jax.export` has to know: how it writes down `ExpertWeights` in a signature, and which custom calls are safe."""

from jax import export

from jax_megamoe.primitives import _library
from jax_megamoe.weights import ExpertWeights, read_header, write_header

# The version of a target is part of its name, so a program that was exported finds the call that it was made for.
_TARGETS = (_library.MOE_TARGET, _library.MOE_PEERS_TARGET, _library.ROUTE_TARGET)
DISABLE_JAX_EXPORT_CHECKS = tuple(export.DisabledSafetyCheck.custom_call(target) for target in _TARGETS)

# A program for weights of another layout version is a LayoutError when it is read back.
export.register_pytree_node_serialization(
    ExpertWeights,
    serialized_name="jax_megamoe.ExpertWeights",
    serialize_auxdata=write_header,
    deserialize_auxdata=read_header,
)
