"""The expert layer by the names of MaxText: its options, parameters and mesh axes, to put into its `RoutedMoE`.

    python -m examples.maxtext_layer

MaxText itself is not needed: `config` may be its configuration, or any object with these fields. What they mean there
depends on `model_name` and `decoder_block` (its `layers/moe.py`, 0.2.5); what is not served is a ValueError. Inference
only. Shapes: B batch, S length, H emb_dim, I moe_mlp_dim, E num_experts.
"""

from collections.abc import Sequence
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

# Models whose router's bias has a say in the selection and none in the weights, and which may have groups.
SELECTION_BIAS_MODELS = ("deepseek3", "deepseek4", "kimi-k2")
# Decoder blocks whose weights are scores times `routed_scaling_factor`. Those of the others are a softmax over the
# selected logits, whatever that factor is.
SCORE_BLOCKS = ("deepseek", "deepseek4")
# The others that are served. Llama-4's and Gemma-4's have rules of their own.
SOFTMAX_BLOCKS = (
    *("default", "llama2", "mistral", "mixtral", "gpt_oss", "olmo3", "envy"),
    *("qwen2", "qwen3", "qwen3_moe", "qwen3_custom_moe", "qwen3_next", "qwen3_5"),
)


class RoutingConfig(Protocol):
    """The fields of MaxText's configuration that the layer reads."""

    num_experts_per_tok: int
    model_name: str
    decoder_block: Any  # a string, or MaxText's enumeration of these
    routed_score_func: str
    routed_scaling_factor: float
    routed_bias: bool
    n_routing_groups: int  # -1: none
    topk_routing_group: int
    mlp_activations: Sequence[str]
    mlp_activations_limit: float  # not above 0: none
    mlp_bias: bool
    capacity_factor: float  # above 0, tokens are dropped there; refused
    use_random_routing: bool  # refused


@dataclass
class Config:
    """The same by itself, with MaxText's defaults."""

    num_experts_per_tok: int
    model_name: str = "default"
    decoder_block: Any = "llama2"
    routed_score_func: str = ""
    routed_scaling_factor: float = 1.0
    routed_bias: bool = False
    n_routing_groups: int = -1
    topk_routing_group: int = -1
    mlp_activations: Sequence[str] = ("silu", "linear")
    mlp_activations_limit: float = -1.0
    mlp_bias: bool = False
    capacity_factor: float = -1.0
    use_random_routing: bool = False


def pack(
    wi_0: jax.Array,
    wi_1: jax.Array,
    wo: jax.Array,
    mesh: Mesh | None = None,
    biases: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> mm.ExpertWeights:
    """Quantises the parameters of `RoutedMoE`, `wi_0` and `wi_1` [E, H, I] and `wo` [E, I, H], onto the mesh, once.

    With `biases`, `wi_0_bias` and `wi_1_bias` [E, I] and `wo_bias` [E, H], which it has where `mlp_bias` is set, FP8
    has a scale for each row.
    """
    options: dict[str, Any] = {}
    if biases is not None:
        gate_up_bias = jnp.concatenate(biases[:2], axis=-1)
        options = {"format": "fp8_channel", "gate_up_bias": gate_up_bias, "down_bias": biases[2]}
    weights = mm.quantize_experts(wi_0, wi_1, wo, order="in_out", **options)
    return weights if mesh is None else jax.device_put(weights, NamedSharding(mesh, P(_expert_axis(mesh))))


def routed_moe(
    config: RoutingConfig,
    mesh: Mesh | None,
    inputs: jax.Array,
    gate_kernel: jax.Array,
    gate_bias: jax.Array | None,
    weights: mm.ExpertWeights,
) -> jax.Array:
    """What `RoutedMoE.__call__` gives for inputs [B, S, H]; its `gate.kernel` [H, E], and `gate.bias` [E] or None.

    Not of layers that choose experts by a hash, which only their own arguments tell from others. Logits are float32.
    """
    if config.capacity_factor > 0 or config.use_random_routing:
        raise ValueError(
            f"config.capacity_factor is {config.capacity_factor} and use_random_routing {config.use_random_routing}, "
            "wanted neither: this layer drops no token."
        )
    if config.routed_bias != (gate_bias is not None):
        raise ValueError(f"config.routed_bias is {config.routed_bias}, wanted gate_bias if and only if it is set.")
    if config.mlp_bias and weights.format == "fp8_block":
        raise ValueError("config.mlp_bias is set, and weights have no biases: give them to pack.")
    logits = jnp.matmul(inputs.astype(jnp.float32), gate_kernel.astype(jnp.float32), precision="highest")
    ids, topk_weights = route(config, logits, gate_bias)
    # Of a mesh without some of the axes, those that it has.
    names = BATCH_AXES if mesh is None else tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    y = mm.moe(
        inputs.astype(jnp.bfloat16),
        weights,
        ids,
        topk_weights,
        expert_axis=_expert_axis(mesh),
        token_axes=names,
        **moe_options(config),
    )
    return y.astype(inputs.dtype)


def route(config: RoutingConfig, logits: jax.Array, gate_bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Experts int32[B, S, k] and weights f32[B, S, k] of logits f32[B, S, E], as `RoutedMoE.get_topk`."""
    block, score = _block_of(config), config.routed_score_func
    has_selection_bias = config.model_name.startswith(SELECTION_BIAS_MODELS)
    if block not in SCORE_BLOCKS:
        if score or has_selection_bias:
            raise ValueError(
                f"config has decoder_block {block!r} with routed_score_func {score!r} and model_name "
                f"{config.model_name!r}, wanted the first two of one family: a softmax over scores is not served."
            )
        logits = logits if gate_bias is None else logits + gate_bias
        # A softmax over all, divided by the sum of the selected ones, is one over these.
        return mm.route(logits, config.num_experts_per_tok, scoring="softmax")
    if score not in ("sigmoid", "sqrtsoftplus", "softmax"):
        raise ValueError(f"config.routed_score_func is {score!r}, wanted 'sigmoid', 'sqrtsoftplus' or 'softmax'.")
    if gate_bias is not None and not has_selection_bias:
        raise ValueError(
            f"config.model_name is {config.model_name!r}, whose router's bias is in the weights too, wanted one of "
            f"{', '.join(SELECTION_BIAS_MODELS)}, or no bias."
        )
    options: dict[str, Any] = {"scoring": score, "bias": gate_bias, "renormalize": score != "softmax"}
    if has_selection_bias and config.n_routing_groups != -1:
        options |= {"num_groups": config.n_routing_groups, "top_groups": config.topk_routing_group}
    return mm.route(logits, config.num_experts_per_tok, **options)


def moe_options(config: RoutingConfig) -> dict[str, Any]:
    """Keywords of `mm.moe`: factor and activation, as `RoutedMoE.apply_ffn_activation`."""
    block, limit = _block_of(config), config.mlp_activations_limit
    wanted = ["sigmoid", "linear"] if block == "gpt_oss" else ["silu", "linear"]
    if list(config.mlp_activations) != wanted:
        raise ValueError(f"config.mlp_activations is {config.mlp_activations}, wanted {wanted} with {block!r}.")
    if block == "gpt_oss":
        if limit <= 0:
            raise ValueError(f"config.mlp_activations_limit is {limit}, wanted a positive one with 'gpt_oss'.")
        return {"activation": mm.SwiGLU(alpha=1.702, up_offset=1.0), "activation_clamp": limit}
    if block not in SCORE_BLOCKS:
        return {}  # the others have neither limit nor factor
    return {
        "routed_scaling_factor": config.routed_scaling_factor,
        "activation_clamp": limit if limit > 0 else None,
    }


def _expert_axis(mesh: Mesh | None) -> str | None:
    return EXPERT_AXIS if mesh is None or EXPERT_AXIS in mesh.axis_names else None


def _block_of(config: RoutingConfig) -> str:
    block = str(getattr(config.decoder_block, "value", config.decoder_block))
    if block not in SCORE_BLOCKS + SOFTMAX_BLOCKS:
        known = ", ".join(SCORE_BLOCKS + SOFTMAX_BLOCKS)
        raise ValueError(f"config.decoder_block is {block!r}, whose router is not served here, wanted one of {known}.")
    return block


def main() -> None:
    """Runs a random layer on one device, or, where there are eight, on a mesh of data 2, fsdp 1, tensor 1, expert 4."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(16, 256, 128), (16, 256, 128), (16, 128, 256)]
    wi_0, wi_1, wo = (jax.random.normal(k, s) / s[1] ** 0.5 for k, s in zip(keys[:3], shapes, strict=True))
    gate = jax.random.normal(keys[3], (256, 16)) / 16
    inputs = jax.random.normal(keys[4], (8, 2, 256), jnp.bfloat16)
    config = Config(4, "deepseek3-671b", "deepseek", routed_score_func="sigmoid", routed_scaling_factor=2.5)
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
