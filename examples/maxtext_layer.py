"""The expert layer by the names of MaxText: its options, parameters and mesh axes, to put into its `RoutedMoE`.

    python -m examples.maxtext_layer

MaxText itself is not needed: `config` may be its configuration, or any object with these fields. Inference only.
Shapes: B batch, S length, H emb_dim, I moe_mlp_dim, E num_experts.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm

# Of MaxText's mesh axes, those that its rules split batches of activations by, and experts. A program's mesh may have
# others, and lack some of these.
BATCH_AXES = ("data", "fsdp", "expert")
EXPERT_AXIS = "expert"


class RoutingConfig(Protocol):
    """The fields of MaxText's configuration that the layer reads."""

    num_experts_per_tok: int
    routed_score_func: str  # "" is a softmax over the selected logits
    routed_scaling_factor: float
    n_routing_groups: int  # -1: none
    topk_routing_group: int
    mlp_activations_limit: float  # not above 0: none


@dataclass
class Config:
    """The same by itself, with MaxText's defaults."""

    num_experts_per_tok: int
    routed_score_func: str = ""
    routed_scaling_factor: float = 1.0
    n_routing_groups: int = -1
    topk_routing_group: int = -1
    mlp_activations_limit: float = -1.0


def pack(wi_0: jax.Array, wi_1: jax.Array, wo: jax.Array, mesh: Mesh | None = None) -> mm.ExpertWeights:
    """Quantises the parameters of `RoutedMoE`, `wi_0` and `wi_1` [E, H, I] and `wo` [E, I, H], onto the mesh, once."""
    weights = mm.quantize_experts(wi_0, wi_1, wo, order="in_out")
    return weights if mesh is None else jax.device_put(weights, NamedSharding(mesh, P(EXPERT_AXIS)))


def routed_moe(
    config: RoutingConfig,
    mesh: Mesh | None,
    inputs: jax.Array,
    gate_kernel: jax.Array,
    gate_bias: jax.Array | None,
    weights: mm.ExpertWeights,
) -> jax.Array:
    """What `RoutedMoE.__call__` gives for inputs [B, S, H], with its `gate.kernel` [H, E].

    `gate.bias` [E], or None, is that of DeepSeek's models: it has a say in the selection, and none in the weights.
    """
    logits = jnp.matmul(inputs.astype(jnp.float32), gate_kernel.astype(jnp.float32), precision="highest")
    ids, topk_weights = mm.route(logits, config.num_experts_per_tok, bias=gate_bias, **route_options(config))
    # Of a mesh without some of the axes, those that it has.
    names = BATCH_AXES if mesh is None else tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    y = mm.moe(
        inputs.astype(jnp.bfloat16),
        weights,
        ids,
        topk_weights,
        routed_scaling_factor=config.routed_scaling_factor,
        activation_clamp=config.mlp_activations_limit if config.mlp_activations_limit > 0 else None,
        expert_axis=EXPERT_AXIS if mesh is None or EXPERT_AXIS in mesh.axis_names else None,
        token_axes=names,
    )
    return y.astype(inputs.dtype)


def route_options(config: RoutingConfig) -> dict[str, Any]:
    """Keywords of `mm.route`, but `top_k` and the bias.

    Without a score function, MaxText takes a softmax over the selected logits, which is what `route` does with
    "softmax" and `renormalize`: its scores of all experts, divided by the sum of the selected ones.
    """
    options: dict[str, Any] = {"scoring": config.routed_score_func or "softmax"}
    if config.n_routing_groups > 0:
        options |= {"num_groups": config.n_routing_groups, "top_groups": config.topk_routing_group}
    return options


def main() -> None:
    """Runs a random layer on one device, or, where there are eight, on a mesh of data 2, fsdp 1, tensor 1, expert 4."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(16, 256, 128), (16, 256, 128), (16, 128, 256)]
    wi_0, wi_1, wo = (jax.random.normal(k, s) / s[1] ** 0.5 for k, s in zip(keys[:3], shapes, strict=True))
    gate = jax.random.normal(keys[3], (256, 16)) / 16
    inputs = jax.random.normal(keys[4], (8, 2, 256), jnp.bfloat16)
    config = Config(num_experts_per_tok=4, routed_score_func="sigmoid", routed_scaling_factor=2.5)
    mesh = None
    if len(jax.devices()) >= 8:
        axes = ("data", "fsdp", "tensor", "expert")
        mesh = jax.make_mesh((2, 1, 1, 4), axes, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:8])
        inputs = jax.device_put(inputs, NamedSharding(mesh, P(BATCH_AXES)))
    layer = jax.jit(lambda inputs, weights: routed_moe(config, mesh, inputs, gate, None, weights))
    y = layer(inputs, pack(wi_0, wi_1, wo, mesh))
    print("y", y.shape, y.dtype, y.sharding)


if __name__ == "__main__":
    main()
