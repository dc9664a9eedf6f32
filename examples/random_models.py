"""Decoders with random weights of the sizes that published models have, to time them without their checkpoints.

Of DeepSeek's models one device has what one of eight ranks has: an eighth of the experts, of the heads and of the
vocabulary. Only layers whose experts a router chooses: the first ones of DeepSeek-V3, without experts, are left out,
and so are those of DeepSeek-V4 that choose by a hash.

Shapes: L layers, E experts, H hidden_size, I moe_intermediate_size; and those of each decoder.
"""

import functools
import importlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

import jax_megamoe as mm
from examples import deepseek_v3, deepseek_v4, qwen3_moe
from examples.deepseek_v4_attention import HEAVY, SPARSE, Attention, Compressor, Indexer, num_series
from examples.experts import FloatExperts

# Fields of config.json that give a model its sizes. "formats" are those of the experts of `moe`, by the name of the
# way: that of the checkpoint first. Where nothing else is said, it is FP8 with a scale for each block.
_QWEN3 = {"model_type": "qwen3_moe", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "first_k_dense_replace": 0}
_DEEPSEEK = {"model_type": "deepseek_v3", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "first_k_dense_replace": 0}
_DEEPSEEK_V4 = {
    "model_type": "deepseek_v4",
    "formats": {"moe": "mxfp4", "moe_fp8": "fp8_block"},
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "compress_rope_theta": 1.6e5,
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1}
    | {"original_max_position_embeddings": 65536},
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": _QWEN3
    | {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}
    | {"num_hidden_layers": 48},
    "deepseek-v3": _DEEPSEEK
    | {"hidden_size": 7168, "moe_intermediate_size": 2048, "num_experts": 32, "num_experts_per_tok": 8}
    | {"num_attention_heads": 16, "q_lora_rank": 1536, "kv_lora_rank": 512, "vocab_size": 129280 // 8}
    | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_hidden_layers": 61 - 3},
    # Of deepseek-ai/DeepSeek-V4-Flash's config.json as public repositories quote it; transformers' DeepseekV4Config
    # has the same sizes. Its compress_ratios are 0, 0, 4, 128, 4, 128, ..., 4, of 43 layers. The first three choose
    # experts by a hash, and with them go both layers that have a window only.
    "deepseek-v4-flash": _DEEPSEEK_V4
    | {"hidden_size": 4096, "moe_intermediate_size": 2048, "num_experts": 32, "num_experts_per_tok": 6}
    | {"num_attention_heads": 64 // 8, "head_dim": 512, "qk_rope_head_dim": 64, "vocab_size": 129280 // 8}
    | {"q_lora_rank": 1024, "o_groups": 8 // 8, "o_lora_rank": 1024, "sliding_window": 128}
    | {"compress_ratios": [128, 4] * 20, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512}
    | {"num_hidden_layers": 43 - 3, "swiglu_limit": 10.0},
    "tiny-qwen3": _QWEN3
    | {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64}
    | {"num_hidden_layers": 4},
    "tiny-deepseek": _DEEPSEEK
    | {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
    | {"num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "vocab_size": 64}
    | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "num_hidden_layers": 4},
    # With a layer of each kind.
    "tiny-deepseek-v4": _DEEPSEEK_V4
    | {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
    | {"num_attention_heads": 2, "head_dim": 32, "qk_rope_head_dim": 16, "vocab_size": 64}
    | {"q_lora_rank": 32, "o_groups": 1, "o_lora_rank": 32, "sliding_window": 4}
    | {"compress_ratios": [0, 2, 4, 2, 4], "compress_rates": {SPARSE: 2, HEAVY: 4}}
    | {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 2}
    | {"num_hidden_layers": 5, "swiglu_limit": 10.0},
}


def ways_of(name: str) -> list[str]:
    """The ways in which a model's experts are multiplied: by `moe`, of each format, and by `ragged_dot`."""
    return [*_formats(MODELS[name]), "ragged_dot"]


def _formats(fields: dict[str, Any]) -> dict[str, Any]:
    formats: dict[str, Any] = fields.get("formats", {"moe": "fp8_block"})
    return formats


@dataclass(frozen=True)
class Model:
    """A decoder with random weights."""

    module: ModuleType
    config: Any
    num_layers: int
    vocabulary_size: int
    ways: dict[str, tuple[Any, Any]]  # parameters and experts, by the name of what multiplies the experts


def make(name: str, num_layers: int, ways: Sequence[str], key: jax.Array) -> Model:
    """The first layers of a model, with experts of the same values for each of the ways.

    Beside what it returns it holds no more than one layer's experts in BF16, and what making these takes.
    """
    fields = MODELS[name] | {"num_hidden_layers": num_layers}
    family = fields["model_type"]
    routed_key, shared_key, key = jax.random.split(key, 3)
    keys = (jax.random.fold_in(key, i) for i in itertools.count())
    make_parameters = {"qwen3_moe": _qwen3_moe, "deepseek_v3": _deepseek_v3, "deepseek_v4": _deepseek_v4}
    config, parameters = make_parameters[family](fields, keys)
    shape = (fields["num_experts"], fields["hidden_size"], fields["moe_intermediate_size"])
    shared_arguments = (shared_key, num_layers, (1, *shape[1:]))
    has_shared = "shared" in parameters._fields
    quantized_parameters = float_parameters = parameters
    if has_shared and any(way != "ragged_dot" for way in ways):
        # FP8 in checkpoints of DeepSeek's, also where the routed ones are MXFP4.
        quantized_parameters = parameters._replace(shared=quantized_experts(*shared_arguments, "fp8_block"))
    if has_shared and "ragged_dot" in ways:
        float_parameters = parameters._replace(shared=float_experts(*shared_arguments))
    formats = _formats(fields)
    made: dict[str, tuple[Any, Any]] = {}
    for way in ways:
        if way == "ragged_dot":
            made[way] = (float_parameters, float_experts(routed_key, num_layers, shape))
        else:
            made[way] = (quantized_parameters, quantized_experts(routed_key, num_layers, shape, formats[way]))
    module = importlib.import_module(f"examples.{family}")
    return Model(module, config, num_layers, fields["vocab_size"], made)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_array(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Normal values that keep outputs about as large as inputs."""
    return (jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5).astype(dtype)


def quantized_experts(key: jax.Array, num_layers: int, shape: tuple[int, int, int], format: Any) -> mm.ExpertWeights:
    """Stacked experts of all layers; `shape` is E, H, I."""
    keys = jax.random.split(key, num_layers)
    return mm.stack_experts(
        (mm.quantize_experts(*_matrices(key, shape), format=format) for key in keys), num_layers=num_layers
    )


def float_experts(key: jax.Array, num_layers: int, shape: tuple[int, int, int]) -> tuple[FloatExperts, ...]:
    """The BF16 values before `quantized_experts` of this key, layer by layer.

    Made again rather than kept: one layer in three orders is much.
    """

    @jax.jit
    def transpose(gate: jax.Array, up: jax.Array, down: jax.Array) -> FloatExperts:
        both = jnp.concatenate([gate, up], axis=1)
        return FloatExperts(jnp.swapaxes(both, 1, 2), jnp.swapaxes(down, 1, 2))

    return tuple(transpose(*_matrices(key, shape)) for key in jax.random.split(key, num_layers))


@functools.partial(jax.jit, static_argnames="shape")
def _matrices(key: jax.Array, shape: tuple[int, int, int]) -> list[jax.Array]:
    """bf16 gate and up [E, I, H] and down [E, H, I] of one layer."""
    e, h, i = shape
    keys = jax.random.split(key, (3, e))
    # Expert by expert: random bits take several times the room of what is made of them.
    return [jax.lax.map(lambda k, s=s: random_array(k, s), keys[n]) for n, s in enumerate(((i, h), (i, h), (h, i)))]


def _qwen3_moe(fields: dict[str, Any], keys: Iterator[jax.Array]) -> tuple[Any, Any]:
    h, d, n, k = (fields[key] for key in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads"))
    count = fields["num_hidden_layers"]
    layers = qwen3_moe.Layers(
        attention_norm=_ones(count, h),
        query=random_array(next(keys), (count, n, d, h)),
        key=random_array(next(keys), (count, k, d, h)),
        value=random_array(next(keys), (count, k, d, h)),
        query_norm=_ones(count, d),
        key_norm=_ones(count, d),
        attention_out=random_array(next(keys), (count, h, n, d)),
        expert_norm=_ones(count, h),
        router=random_array(next(keys), (count, fields["num_experts"], h), jnp.float32),
    )
    embedding, norm, unembedding = _ends(fields, keys)
    config = qwen3_moe.Config.of(fields, {"top_k": fields["num_experts_per_tok"]})
    return config, qwen3_moe.Parameters(embedding, layers, norm, unembedding)


def _deepseek_v3(fields: dict[str, Any], keys: Iterator[jax.Array]) -> tuple[Any, Any]:
    h, n, q, c = (fields[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank"))
    a, r, d = (fields[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    count, e = fields["num_hidden_layers"], fields["num_experts"]
    attention = deepseek_v3.Attention(
        norm=_ones(count, h),
        query_down=random_array(next(keys), (count, q, h)),
        query_norm=_ones(count, q),
        query_up=random_array(next(keys), (count, n, a + r, q)),
        latent_down=random_array(next(keys), (count, c + r, h)),
        latent_norm=_ones(count, c),
        key_up=random_array(next(keys), (count, n, a, c)),
        value_up=random_array(next(keys), (count, n, d, c)),
        out=random_array(next(keys), (count, h, n, d)),
        mlp_norm=_ones(count, h),
    )
    router = deepseek_v3.Router(random_array(next(keys), (count, e, h), jnp.float32), jnp.zeros((count, e)))
    # The first layers, which have no experts, are left out.
    no_mlp = deepseek_v3.DenseMlp(*(jnp.zeros((0, *shape), jnp.bfloat16) for shape in ((8, h), (8, h), (h, 8))))
    no_layers = (jax.tree.map(lambda leaf: leaf[:0], attention), no_mlp)
    embedding, norm, unembedding = _ends(fields, keys)
    options = {"top_k": fields["num_experts_per_tok"], "scoring": "sigmoid", "num_groups": 8, "top_groups": 4}
    config = deepseek_v3.Config.of(fields, options, {"routed_scaling_factor": 2.5})
    return config, deepseek_v3.Parameters(embedding, no_layers, (attention, router), None, norm, unembedding)


def _deepseek_v4(fields: dict[str, Any], keys: Iterator[jax.Array]) -> tuple[Any, Any]:
    options = {"top_k": fields["num_experts_per_tok"], "scoring": "sqrtsoftplus"}
    moe_options = {"routed_scaling_factor": 1.5, "activation_clamp": fields["swiglu_limit"]}
    config = deepseek_v4.Config.of(fields, options, moe_options)
    h, n, d, m, e = config.hidden_size, config.num_heads, config.head_size, config.num_streams, fields["num_experts"]
    q, g, p = fields["q_lora_rank"], config.num_groups, fields["o_lora_rank"]

    def streams(count: int, num_scales: int) -> deepseek_v4.Streams:
        function = random_array(next(keys), (count, m * h), jnp.float32)
        return deepseek_v4.Streams(function, jnp.zeros(count), jnp.ones(num_scales))

    def compressor(rate: int, size: int) -> Compressor:
        columns = num_series(rate, config) * size
        kv, gate = (random_array(next(keys), (columns, h)) for _ in range(2))
        return Compressor(kv, gate, jnp.zeros((rate, columns)), _ones(size))

    def indexer(rate: int) -> Indexer:
        j, c = config.num_index_heads, config.index_size
        return Indexer(compressor(rate, c), random_array(next(keys), (j, c, q)), random_array(next(keys), (j, h)))

    def layer(rate: int) -> deepseek_v4.Layer:
        attention = Attention(
            query_down=random_array(next(keys), (q, h)),
            query_norm=_ones(q),
            query_up=random_array(next(keys), (n, d, q)),
            kv=random_array(next(keys), (d, h)),
            kv_norm=_ones(d),
            sinks=jnp.zeros(n),
            compressor=compressor(rate, d) if rate else None,
            indexer=indexer(rate) if num_series(rate, config) == 2 else None,
            out_down=random_array(next(keys), (g, p, n * d // g)),
            out_up=random_array(next(keys), (h, g, p)),
        )
        return deepseek_v4.Layer(
            attention_streams=streams((2 + m) * m, 3),
            attention_norm=_ones(h),
            attention=attention,
            mlp_streams=streams((2 + m) * m, 3),
            mlp_norm=_ones(h),
            router=random_array(next(keys), (e, h), jnp.float32),
            router_bias=jnp.zeros(e),
            hash_table=None,
        )

    embedding, norm, unembedding = _ends(fields, keys)
    layers = deepseek_v4.stack_layers(config, lambda number: layer(config.rates[number]))
    return config, deepseek_v4.Parameters(embedding, layers, None, streams(m, 1), norm, unembedding)


def _ends(fields: dict[str, Any], keys: Iterator[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embedding [V, H], the last norm [H], and the matrix of the logits [V, H]."""
    size = (fields["vocab_size"], fields["hidden_size"])
    return random_array(next(keys), size), _ones(size[1]), random_array(next(keys), size)


def _ones(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.bfloat16)
