"""Qwen3-MoE in pure JAX: a decode step for slots of sequences, layers stacked and scanned, the cache donated.

    python -m examples.qwen3_moe Qwen3-30B-A3B-FP8 --prompt 9707,1879 --mesh 2x4

Shapes: B slots, H hidden_size, N heads, K key/value heads, D head_size, L layers, S positions of the cache, E experts,
k experts of a token, V vocabulary.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jax_megamoe as mm
from examples import command
from examples.dense import DenseWeights, open_checkpoint
from examples.experts import Experts, LayerExperts, apply_experts, run_layers
from examples.meshes import DATA, EXPERT_AXIS, TENSOR, place, place_cache, split
from examples.transformer import (
    CacheLeaf,
    angles,
    empty_leaf,
    masked_softmax,
    rms_norm,
    rotary_frequencies,
    rotate,
    visible_positions,
    write_cache,
)


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a model, from its config.json."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    epsilon: float
    is_tied: bool  # the embedding is the unembedding
    rope: Mapping[str, Any]
    route_options: Mapping[str, Any]  # keywords of `mm.route`
    is_unrolled: bool = False  # no scan, and a cache for each layer: see `run_layers`

    @staticmethod
    def of(fields: Mapping[str, Any], route_options: Mapping[str, Any]) -> "Config":
        """From config.json and the options of the checkpoint's routers."""
        num_heads = fields["num_attention_heads"]
        return Config(
            num_layers=fields["num_hidden_layers"],
            hidden_size=fields["hidden_size"],
            num_heads=num_heads,
            num_kv_heads=fields["num_key_value_heads"],
            head_size=fields.get("head_dim") or fields["hidden_size"] // num_heads,
            epsilon=fields["rms_norm_eps"],
            is_tied=bool(fields.get("tie_word_embeddings", False)),
            rope=fields,
            route_options=route_options,
        )


class Layers(NamedTuple):
    """All layers but their experts, with a leading L; one layer without it."""

    attention_norm: jax.Array  # [L, H]
    query: jax.Array  # [L, N, D, H]: heads first, so that a part of the array is what a device needs
    key: jax.Array  # [L, K, D, H]
    value: jax.Array  # [L, K, D, H]
    query_norm: jax.Array  # [L, D]
    key_norm: jax.Array  # [L, D]
    attention_out: jax.Array  # [L, H, N, D]
    expert_norm: jax.Array  # [L, H]
    router: jax.Array  # f32[L, E, H]


class Parameters(NamedTuple):
    """The model without its experts."""

    embedding: jax.Array  # [V, H]
    layers: Layers
    norm: jax.Array  # [H]
    unembedding: jax.Array  # [V, H]


class Cache(NamedTuple):
    """Keys, rotated, and values of each slot's positions."""

    keys: CacheLeaf  # [L, B, K, S, D], or L of [B, K, S, D]
    values: CacheLeaf  # likewise


# How arrays are split over a mesh: what is not named is whole on each device.
SPLITS: dict[str, tuple[str | None, ...]] = {
    "query": (None, TENSOR),
    "key": (None, TENSOR),
    "value": (None, TENSOR),
    "attention_out": (None, None, TENSOR),
    "unembedding": (TENSOR,),
    "cache": (DATA, TENSOR),  # of one layer
}


def load(
    folder: str | os.PathLike[str],
    *,
    experts_folder: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> tuple[Config, Parameters, mm.ExpertWeights]:
    """Reads a checkpoint onto the devices.

    `experts_folder` is what `python -m jax_megamoe convert` has made of it; without one, experts are packed here.
    `dtype` is that of everything but experts and router.
    """
    checkpoint = open_checkpoint(folder, experts_folder, "qwen3_moe")
    config = Config.of(checkpoint.config, checkpoint.router(0).options)
    if checkpoint.moe_layers != list(range(config.num_layers)):
        raise ValueError(f"{folder} has layers without experts, wanted none: this example scans equal layers.")
    experts = checkpoint.experts(mesh=mesh, expert_axis=EXPERT_AXIS)
    dense = DenseWeights(folder, dtype)

    def stack(field: str, name: str, *shape: int) -> jax.Array:
        array = dense.stack(range(config.num_layers), f"{name}.weight", *shape)
        return place(array, mesh, *SPLITS.get(field, ()))

    n, k, d, h = config.num_heads, config.num_kv_heads, config.head_size, config.hidden_size
    routers = np.stack([np.asarray(checkpoint.router(layer).weight) for layer in range(config.num_layers)])
    layers = Layers(
        attention_norm=stack("attention_norm", "input_layernorm"),
        query=stack("query", "self_attn.q_proj", n, d, h),
        key=stack("key", "self_attn.k_proj", k, d, h),
        value=stack("value", "self_attn.v_proj", k, d, h),
        query_norm=stack("query_norm", "self_attn.q_norm"),
        key_norm=stack("key_norm", "self_attn.k_norm"),
        attention_out=stack("attention_out", "self_attn.o_proj", h, n, d),
        expert_norm=stack("expert_norm", "post_attention_layernorm"),
        router=place(routers, mesh),
    )
    embedding = dense.read("model.embed_tokens.weight")
    unembedding = embedding if config.is_tied else dense.read("lm_head.weight")
    parameters = Parameters(
        embedding=place(embedding, mesh),
        layers=layers,
        norm=place(dense.read("model.norm.weight"), mesh),
        unembedding=place(unembedding, mesh, *SPLITS["unembedding"]),
    )
    return config, parameters, experts


def empty_cache(config: Config, num_slots: int, length: int, dtype: Any, mesh: Mesh | None = None) -> Cache:
    """A cache for `num_slots` sequences of up to `length` tokens."""
    shape = (num_slots, config.num_kv_heads, length, config.head_size)
    leaves = (empty_leaf(config.num_layers, shape, dtype, not config.is_unrolled) for _ in range(2))
    return Cache(*(place_cache(leaf, mesh, *SPLITS["cache"]) for leaf in leaves))


def decode_step(
    config: Config,
    parameters: Parameters,
    experts: Experts,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Logits f32[B, V] of what follows tokens int32[B] at positions int32[B], and the cache with them in it.

    A position of -1 marks an empty slot: its experts are none, it writes nothing, and its logits mean nothing.
    """
    tokens, positions = split((tokens, positions), DATA)
    is_used = positions >= 0
    cos, sin = angles(positions, *rotary_frequencies(config.rope, config.head_size))
    visible = visible_positions(positions, jax.tree.leaves(cache)[0].shape[-2])

    def attend(x: jax.Array, layer: Layers, i: int | jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """What attention adds to x[B, H]."""
        normalized = rms_norm(x, layer.attention_norm, config.epsilon)
        query = rms_norm(jnp.einsum("bh,ndh->bnd", normalized, layer.query), layer.query_norm, config.epsilon)
        key = rms_norm(jnp.einsum("bh,kdh->bkd", normalized, layer.key), layer.key_norm, config.epsilon)
        value = jnp.einsum("bh,kdh->bkd", normalized, layer.value)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        cache = Cache(write_cache(cache.keys, i, positions, key), write_cache(cache.values, i, positions, value))
        # Heads g of a group share the keys of head k.
        query = query.reshape(len(x), config.num_kv_heads, -1, config.head_size)
        scores = jnp.einsum("bkgd,bksd->bkgs", query, cache.keys[i], preferred_element_type=jnp.float32)
        weights = masked_softmax(scores * config.head_size**-0.5, visible[:, None, None])
        mixed = jnp.einsum("bkgs,bksd->bkgd", weights.astype(x.dtype), cache.values[i])
        mixed = mixed.reshape(len(x), config.num_heads, config.head_size)
        return jnp.einsum("bnd,hnd->bh", mixed, layer.attention_out), cache

    def add_layer(
        x: jax.Array, cache: Cache, i: int | jax.Array, layer: Layers, experts: LayerExperts
    ) -> tuple[jax.Array, Cache]:
        added, cache = attend(x, layer, i, cache)
        x = split(x + added, DATA)
        normalized = split(rms_norm(x, layer.expert_norm, config.epsilon), DATA)
        logits = jnp.matmul(normalized.astype(jnp.float32), layer.router.T, precision="highest")
        ids, weights = mm.route(logits, **config.route_options)
        # Empty slots may be anywhere. If they were the last ones, `num_valid_tokens` of `moe` would do.
        ids = jnp.where(is_used[:, None], ids, -1)
        return split(x + apply_experts(experts, normalized, ids, weights, i), DATA), cache

    x = split(parameters.embedding[tokens], DATA)
    x, cache = run_layers(add_layer, x, cache, parameters.layers, experts, is_unrolled=config.is_unrolled)
    x = rms_norm(x, parameters.norm, config.epsilon)
    return jnp.einsum("bh,vh->bv", x, parameters.unembedding, preferred_element_type=jnp.float32), cache


def main() -> None:
    """Continues prompts of token ids."""
    command.main(__doc__, load, empty_cache, decode_step)


if __name__ == "__main__":
    main()
