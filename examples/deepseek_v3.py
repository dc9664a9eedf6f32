"""DeepSeek-V3 in pure JAX: latent attention (MLA) whose cache holds latents, dense layers, then layers of experts.

    python -m examples.deepseek_v3 DeepSeek-V3 --prompt 0,671,6102 --mesh 1x8

The projections from latents to keys and values are absorbed: queries go to the latents instead, and the result of
attention comes from there, so that nothing is ever unpacked for the positions of the cache.

Shapes: B slots, H hidden_size, N heads, Q and C the ranks of queries and of keys and values, A and R the parts of a
head's keys without position and with rotary one, D the size of a head's values, L layers, S positions of the cache, F
the intermediate size of dense layers, E experts, V vocabulary.
"""

import os
from collections.abc import Mapping, Sequence
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
    rope_parameters,
    rotary_frequencies,
    rotate,
    visible_positions,
    write_cache,
    yarn_scale,
)

LATENT_EPSILON = 1e-6  # of the norms of latents, whatever rms_norm_eps is


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a model, from its config.json."""

    num_layers: int
    num_dense_layers: int
    hidden_size: int
    num_heads: int
    query_rank: int | None  # None: queries are not made of latents, as in DeepSeek-V2-Lite
    latent_size: int
    nope_size: int
    rope_size: int
    value_size: int
    epsilon: float
    is_interleaved: bool
    rope: Mapping[str, Any]
    route_options: Mapping[str, Any]  # keywords of `mm.route`
    moe_options: Mapping[str, Any]  # keywords of `mm.moe`
    is_unrolled: bool = False  # no scan, and a cache for each layer: see `run_layers`

    @staticmethod
    def of(fields: Mapping[str, Any], route_options: Mapping[str, Any], moe_options: Mapping[str, Any]) -> "Config":
        """From config.json and the options of the checkpoint's expert layers."""
        return Config(
            num_layers=fields["num_hidden_layers"],
            num_dense_layers=fields["first_k_dense_replace"],
            hidden_size=fields["hidden_size"],
            num_heads=fields["num_attention_heads"],
            query_rank=fields["q_lora_rank"],
            latent_size=fields["kv_lora_rank"],
            nope_size=fields["qk_nope_head_dim"],
            rope_size=fields["qk_rope_head_dim"],
            value_size=fields["v_head_dim"],
            epsilon=fields["rms_norm_eps"],
            is_interleaved=fields.get("rope_interleave", True),
            rope=fields,
            route_options=route_options,
            moe_options=moe_options,
        )

    @property
    def score_scale(self) -> float:
        """What scores of attention are multiplied with; longer contexts by YaRN make it larger."""
        scale = (self.nope_size + self.rope_size) ** -0.5
        rope = rope_parameters(self.rope)
        if rope["rope_type"] == "default" or not rope.get("mscale_all_dim"):
            return scale
        return scale * yarn_scale(rope["factor"], rope["mscale_all_dim"]) ** 2


class Attention(NamedTuple):
    """Attention of all layers, with a leading L; of one layer without it."""

    norm: jax.Array  # [L, H]
    query_down: jax.Array | None  # [L, Q, H]
    query_norm: jax.Array | None  # [L, Q]
    query_up: jax.Array  # [L, N, A + R, Q], or H instead of Q without query_down
    latent_down: jax.Array  # [L, C + R, H]
    latent_norm: jax.Array  # [L, C]
    key_up: jax.Array  # [L, N, A, C]
    value_up: jax.Array  # [L, N, D, C]
    out: jax.Array  # [L, H, N, D]
    mlp_norm: jax.Array  # [L, H], of what comes after attention


class DenseMlp(NamedTuple):
    """The feed-forward networks of the dense layers."""

    gate: jax.Array  # [L, F, H]
    up: jax.Array  # [L, F, H]
    down: jax.Array  # [L, H, F]


class Router(NamedTuple):
    """The routers of the layers with experts."""

    weight: jax.Array  # f32[L, E, H]
    bias: jax.Array  # f32[L, E]


class Parameters(NamedTuple):
    """The model without its routed experts."""

    embedding: jax.Array  # [V, H]
    dense: tuple[Attention, DenseMlp]  # of the first layers
    sparse: tuple[Attention, Router]  # of the layers with experts
    shared: Experts  # of the same layers, stacked
    norm: jax.Array  # [H]
    unembedding: jax.Array  # [V, H]


class Cache(NamedTuple):
    """What all heads share of each slot's positions."""

    latents: CacheLeaf  # normalised, [L, B, S, C], or L of [B, S, C]
    rotary: CacheLeaf  # rotated, [L, B, S, R], or L of [B, S, R]


# How arrays are split over a mesh: what is not named is whole on each device.
SPLITS: dict[str, tuple[str | None, ...]] = {
    "query_up": (None, TENSOR),
    "key_up": (None, TENSOR),
    "value_up": (None, TENSOR),
    "out": (None, None, TENSOR),
    "gate": (None, TENSOR),
    "up": (None, TENSOR),
    "down": (None, None, TENSOR),
    "unembedding": (TENSOR,),
    "cache": (DATA,),  # of one layer
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
    checkpoint = open_checkpoint(folder, experts_folder, "deepseek_v3", "kimi_k2")
    first = checkpoint.moe_layers[0]
    config = Config.of(checkpoint.config, checkpoint.router(first).options, checkpoint.moe_options(first))
    if checkpoint.moe_layers != list(range(config.num_dense_layers, config.num_layers)):
        raise ValueError(f"{folder} has layers without experts among others: this example has them first.")
    dense = DenseWeights(folder, dtype)
    routers = [checkpoint.router(layer) for layer in checkpoint.moe_layers]
    zeros = np.zeros(routers[0].weight.shape[0], np.float32)
    router = Router(
        weight=place(np.stack([np.asarray(router.weight) for router in routers]), mesh),
        bias=place(np.stack([zeros if router.bias is None else np.asarray(router.bias) for router in routers]), mesh),
    )
    dense_layers = range(config.num_dense_layers)
    parameters = Parameters(
        embedding=place(dense.read("model.embed_tokens.weight"), mesh),
        dense=(_attention(config, dense, dense_layers, mesh), _dense_mlp(dense, dense_layers, mesh)),
        sparse=(_attention(config, dense, checkpoint.moe_layers, mesh), router),
        shared=checkpoint.shared_experts(mesh=mesh),
        norm=place(dense.read("model.norm.weight"), mesh),
        unembedding=place(dense.read("lm_head.weight"), mesh, *SPLITS["unembedding"]),
    )
    return config, parameters, checkpoint.experts(mesh=mesh, expert_axis=EXPERT_AXIS)


def _attention(config: Config, dense: DenseWeights, layers: Sequence[int], mesh: Mesh | None) -> Attention:
    n, a, r, c = config.num_heads, config.nope_size, config.rope_size, config.latent_size
    h, d, q = config.hidden_size, config.value_size, config.query_rank

    def stack(field: str, name: str, *shape: int) -> jax.Array:
        return place(dense.stack(layers, f"{name}.weight", *shape), mesh, *SPLITS.get(field, ()))

    up = dense.stack(layers, "self_attn.kv_b_proj.weight", n, a + d, c)
    return Attention(
        norm=stack("norm", "input_layernorm"),
        query_down=None if q is None else stack("query_down", "self_attn.q_a_proj"),
        query_norm=None if q is None else stack("query_norm", "self_attn.q_a_layernorm"),
        query_up=stack(
            "query_up", f"self_attn.{'q_proj' if q is None else 'q_b_proj'}", n, a + r, h if q is None else q
        ),
        latent_down=stack("latent_down", "self_attn.kv_a_proj_with_mqa"),
        latent_norm=stack("latent_norm", "self_attn.kv_a_layernorm"),
        key_up=place(up[:, :, :a], mesh, *SPLITS["key_up"]),
        value_up=place(up[:, :, a:], mesh, *SPLITS["value_up"]),
        out=stack("out", "self_attn.o_proj", h, n, d),
        mlp_norm=stack("mlp_norm", "post_attention_layernorm"),
    )


def _dense_mlp(dense: DenseWeights, layers: Sequence[int], mesh: Mesh | None) -> DenseMlp:
    names = zip(DenseMlp._fields, ("gate_proj", "up_proj", "down_proj"), strict=True)
    return DenseMlp(*(place(dense.stack(layers, f"mlp.{name}.weight"), mesh, *SPLITS[field]) for field, name in names))


def empty_cache(config: Config, num_slots: int, length: int, dtype: Any, mesh: Mesh | None = None) -> Cache:
    """A cache for `num_slots` sequences of up to `length` tokens; not split by heads, as they share it."""
    shapes = ((num_slots, length, size) for size in (config.latent_size, config.rope_size))
    leaves = (empty_leaf(config.num_layers, shape, dtype, not config.is_unrolled) for shape in shapes)
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
    cos, sin = angles(positions, *rotary_frequencies(config.rope, config.rope_size))
    visible = visible_positions(positions, jax.tree.leaves(cache)[0].shape[-2])

    def attend(x: jax.Array, layer: Attention, i: int | jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array, Cache]:
        """x[B, H] with what attention adds, the same normalised for what comes next, and the cache."""
        added, cache = latent_attention(config, x, layer, i, cache, positions, cos, sin, visible)
        x = split(x + added, DATA)
        return x, split(rms_norm(x, layer.mlp_norm, config.epsilon), DATA), cache

    def add_dense_layer(x: jax.Array, cache: Cache, i: int | jax.Array, layer: tuple[Attention, DenseMlp]) -> Any:
        attention, mlp = layer
        x, normalized, cache = attend(x, attention, i, cache)
        gate, up = (jnp.einsum("bh,fh->bf", normalized, matrix) for matrix in (mlp.gate, mlp.up))
        return split(x + jnp.einsum("bf,hf->bh", jax.nn.silu(gate) * up, mlp.down), DATA), cache

    def add_sparse_layer(
        x: jax.Array,
        cache: Cache,
        i: int | jax.Array,
        layer: tuple[Attention, Router],
        experts: LayerExperts,
        shared: LayerExperts,
    ) -> Any:
        attention, router = layer
        x, normalized, cache = attend(x, attention, config.num_dense_layers + i, cache)
        logits = jnp.matmul(normalized.astype(jnp.float32), router.weight.T, precision="highest")
        ids, weights = mm.route(logits, bias=router.bias, **config.route_options)
        # Empty slots may be anywhere. If they were the last ones, `num_valid_tokens` of `moe` would do.
        ids = jnp.where(is_used[:, None], ids, -1)
        results = apply_experts(experts, normalized, ids, weights, i, shared=shared, **config.moe_options)
        return split(x + results, DATA), cache

    x = split(parameters.embedding[tokens], DATA)
    x, cache = run_layers(add_dense_layer, x, cache, parameters.dense, is_unrolled=config.is_unrolled)
    stacks = (parameters.sparse, experts, parameters.shared)
    x, cache = run_layers(add_sparse_layer, x, cache, *stacks, is_unrolled=config.is_unrolled)
    x = rms_norm(x, parameters.norm, config.epsilon)
    return jnp.einsum("bh,vh->bv", x, parameters.unembedding, preferred_element_type=jnp.float32), cache


def latent_attention(
    config: Config,
    x: jax.Array,
    layer: Attention,
    i: int | jax.Array,
    cache: Cache,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    visible: jax.Array,
) -> tuple[jax.Array, Cache]:
    """What attention of layer i adds to x[B, H], and the cache with this position in it."""
    normalized = rms_norm(x, layer.norm, config.epsilon)
    query = normalized
    if layer.query_down is not None and layer.query_norm is not None:
        query = rms_norm(jnp.einsum("bh,qh->bq", query, layer.query_down), layer.query_norm, LATENT_EPSILON)
    query = jnp.einsum("bq,ndq->bnd", query, layer.query_up)
    query_nope, query_rope = query[..., : config.nope_size], query[..., config.nope_size :]
    query_rope = rotate(query_rope, cos, sin, interleaved=config.is_interleaved)

    both = jnp.einsum("bh,ch->bc", normalized, layer.latent_down)
    latent = rms_norm(both[:, : config.latent_size], layer.latent_norm, LATENT_EPSILON)
    # All heads share one rotary key: a dimension of one head for `rotate`.
    rotary = rotate(both[:, None, config.latent_size :], cos, sin, interleaved=config.is_interleaved)[:, 0]
    cache = Cache(
        write_cache(cache.latents, i, positions, latent),
        write_cache(cache.rotary, i, positions, rotary),
    )
    latents = cache.latents[i]
    # (K q = K_up c . q = c . K_up^T q): the query meets latents, not keys.
    query_latent = jnp.einsum("bna,nac->bnc", query_nope, layer.key_up)
    scores = jnp.einsum("bnc,bsc->bns", query_latent, latents, preferred_element_type=jnp.float32)
    scores += jnp.einsum("bnr,bsr->bns", query_rope, cache.rotary[i], preferred_element_type=jnp.float32)
    weights = masked_softmax(scores * config.score_scale, visible[:, None])
    mixed = jnp.einsum("bns,bsc->bnc", weights.astype(x.dtype), latents)
    values = jnp.einsum("bnc,ndc->bnd", mixed, layer.value_up)
    return jnp.einsum("bnd,hnd->bh", values, layer.out), cache


def main() -> None:
    """Continues prompts of token ids."""
    command.main(__doc__, load, empty_cache, decode_step)


if __name__ == "__main__":
    main()
