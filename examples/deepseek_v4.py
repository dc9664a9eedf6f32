"""DeepSeek-V4 in pure JAX: attention over a window and compressed positions, streams instead of a residual, hash layers.

    python -m examples.deepseek_v4 DeepSeek-V4-Flash --prompt 0,671,6102 --mesh 1x8

A layer attends to the last positions, and, most of them, to entries that each stand for `rate` positions before. With
a rate of 4 ("sparse") an entry is made of two windows, and an indexer chooses which entries a token sees; with 128
("heavy") of one, and all are seen. Keys are values, one head for all queries. Layers differ, so they are not scanned.

Shapes: B slots, H hidden_size, M streams, N heads, D head_size, Q the rank of queries, G groups of heads of rank P, W
positions of the window, T entries of the cache, J heads of the indexer, E experts, V vocabulary.
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
from examples.deepseek_v3 import stack_shared_experts
from examples.dense import DenseWeights
from examples.experts import Experts, apply_experts, apply_shared_experts
from examples.meshes import DATA, EXPERT_AXIS, TENSOR, place, split
from examples.transformer import angles, rms_norm, rotary_frequencies

SPARSE, HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a model, from its config.json."""

    num_layers: int
    num_heads: int
    head_size: int
    rope_size: int
    window: int
    rates: tuple[int, ...]  # positions of an entry in each layer, 0 for layers without entries
    num_groups: int
    num_streams: int
    sinkhorn_steps: int
    stream_epsilon: float
    num_index_heads: int
    index_size: int
    num_chosen: int  # entries that an indexer chooses
    epsilon: float
    rope: Mapping[str, Any]  # of layers without entries
    compressed_rope: Mapping[str, Any]  # of the others
    route_options: Mapping[str, Any]  # keywords of `mm.route`
    moe_options: Mapping[str, Any]  # keywords of `mm.moe`
    is_unrolled: bool = True  # there is no other way

    @staticmethod
    def of(fields: Mapping[str, Any], route_options: Mapping[str, Any], moe_options: Mapping[str, Any]) -> "Config":
        """From config.json and the options of the checkpoint's expert layers."""
        rates = fields.get("compress_ratios")
        if rates is None:
            by_type = fields["compress_rates"]
            rates = [by_type.get(kind, 0) for kind in fields["layer_types"]]
        scaling = fields.get("rope_scaling") or {}
        return Config(
            num_layers=fields["num_hidden_layers"],
            num_heads=fields["num_attention_heads"],
            head_size=fields["head_dim"],
            rope_size=fields["qk_rope_head_dim"],
            window=fields["sliding_window"],
            rates=tuple(rates[: fields["num_hidden_layers"]]),
            num_groups=fields["o_groups"],
            num_streams=fields["hc_mult"],
            sinkhorn_steps=fields["hc_sinkhorn_iters"],
            stream_epsilon=fields["hc_eps"],
            num_index_heads=fields["index_n_heads"],
            index_size=fields["index_head_dim"],
            num_chosen=fields["index_topk"],
            epsilon=fields["rms_norm_eps"],
            rope={"rope_theta": fields["rope_theta"]},
            compressed_rope={"rope_scaling": scaling, "rope_theta": fields["compress_rope_theta"]},
            route_options=route_options,
            moe_options=moe_options,
        )


class Compressor(NamedTuple):
    """Makes entries of size C. Of two series, F = 2, the first is for the next window's entry; else F = 1."""

    kv: jax.Array  # [F C, H]
    gate: jax.Array  # [F C, H]
    bias: jax.Array  # f32[rate, F C], added to gates by the place in the window
    norm: jax.Array  # [C]


class Indexer(NamedTuple):
    """Scores entries of its own for each token."""

    compressor: Compressor
    query_up: jax.Array  # [J, C, Q]
    weights: jax.Array  # [J, H]


class Streams(NamedTuple):
    """How M streams become the input of a block, and take in its output; of the head: how they become one."""

    function: jax.Array  # f32[(2 + M) M, M H], the head's [M, M H]
    base: jax.Array  # f32[(2 + M) M], [M]
    scale: jax.Array  # f32[3], [1]


class Layer(NamedTuple):
    """A layer without its experts."""

    attention_streams: Streams
    attention_norm: jax.Array  # [H]
    query_down: jax.Array  # [Q, H]
    query_norm: jax.Array  # [Q]
    query_up: jax.Array  # [N, D, Q]
    kv: jax.Array  # [D, H]
    kv_norm: jax.Array  # [D]
    sinks: jax.Array  # f32[N], scores of nothing
    compressor: Compressor | None
    indexer: Indexer | None
    out_down: jax.Array  # [G, P, N D / G]
    out_up: jax.Array  # [H, G, P]
    mlp_streams: Streams
    mlp_norm: jax.Array  # [H]
    router: jax.Array  # f32[E, H]
    router_bias: jax.Array | None  # f32[E]
    hash_table: jax.Array | None  # int32[V, k]


class Parameters(NamedTuple):
    """The model without its routed experts."""

    embedding: jax.Array  # [V, H]
    layers: tuple[Layer, ...]
    shared: Experts  # stacked
    head: Streams
    norm: jax.Array  # [H]
    unembedding: jax.Array  # [V, H]


class Compressed(NamedTuple):
    """What a compressor keeps: keys and gates of the last F windows by position, and the entries."""

    kv: jax.Array  # [B, F rate, F C]
    gate: jax.Array  # f32[B, F rate, F C]
    entries: jax.Array  # [B, T, C]


class LayerCache(NamedTuple):
    """Of one layer; position p is in place p % W of the window."""

    window: jax.Array  # [B, W, D]
    compressed: Compressed | None
    index: Compressed | None


Cache = tuple[LayerCache, ...]

# How arrays are split over a mesh: what is not named is whole on each device.
SPLITS: dict[str, tuple[str | None, ...]] = {
    "query_up": (TENSOR,),
    "sinks": (TENSOR,),
    "out_down": (TENSOR,),
    "out_up": (None, TENSOR),
    "unembedding": (TENSOR,),
    "cache": (DATA,),
}


def load(
    folder: str | os.PathLike[str],
    *,
    experts_folder: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> tuple[Config, Parameters, mm.ExpertWeights]:
    """Reads a checkpoint onto the devices, as `deepseek_v3.load`."""
    checkpoint = mm.read_checkpoint(experts_folder or folder)
    if checkpoint.family != "deepseek_v4":
        raise ValueError(f"{folder} holds {checkpoint.family}, wanted deepseek_v4: use the example of its family.")
    last = checkpoint.moe_layers[-1]
    config = Config.of(checkpoint.config, checkpoint.router(last).options, checkpoint.moe_options(last))
    dense = DenseWeights(folder, dtype)

    def read(name: str, *shape: int, field: str = "", dtype: Any = None) -> jax.Array:
        return place(dense.read(name, *shape, dtype=dtype), mesh, *SPLITS.get(field, ()))

    def streams(stem: str) -> Streams:
        return Streams(*(read(f"{stem}_{name}", dtype=np.float32) for name in ("fn", "base", "scale")))

    def compressor(stem: str) -> Compressor:
        bias = read(f"{stem}.ape", dtype=np.float32)
        return Compressor(read(f"{stem}.wkv.weight"), read(f"{stem}.wgate.weight"), bias, read(f"{stem}.norm.weight"))

    def layer(number: int) -> Layer:
        stem, attention = f"layers.{number}", f"layers.{number}.attn"
        router, rate = checkpoint.router(number), config.rates[number]
        indexer = None
        if _num_series(rate, config) == 2:
            query_up = read(f"{attention}.indexer.wq_b.weight", config.num_index_heads, config.index_size, -1)
            weights = read(f"{attention}.indexer.weights_proj.weight")
            indexer = Indexer(compressor(f"{attention}.indexer.compressor"), query_up, weights)
        heads, groups = (config.num_heads, config.head_size), config.num_groups
        group_size = config.num_heads * config.head_size // groups
        hidden_size = router.weight.shape[1]
        return Layer(
            attention_streams=streams(f"{stem}.hc_attn"),
            attention_norm=read(f"{stem}.attn_norm.weight"),
            query_down=read(f"{attention}.wq_a.weight"),
            query_norm=read(f"{attention}.q_norm.weight"),
            query_up=read(f"{attention}.wq_b.weight", *heads, -1, field="query_up"),
            kv=read(f"{attention}.wkv.weight"),
            kv_norm=read(f"{attention}.kv_norm.weight"),
            sinks=read(f"{attention}.attn_sink", field="sinks", dtype=np.float32),
            compressor=compressor(f"{attention}.compressor") if rate else None,
            indexer=indexer,
            out_down=read(f"{attention}.wo_a.weight", groups, -1, group_size, field="out_down"),
            out_up=read(f"{attention}.wo_b.weight", hidden_size, groups, -1, field="out_up"),
            mlp_streams=streams(f"{stem}.hc_ffn"),
            mlp_norm=read(f"{stem}.ffn_norm.weight"),
            router=place(router.weight, mesh),
            router_bias=None if router.bias is None else place(router.bias, mesh),
            hash_table=None if router.hash_table is None else place(router.hash_table, mesh),
        )

    parameters = Parameters(
        embedding=read("embed.weight"),
        layers=tuple(layer(number) for number in range(config.num_layers)),
        shared=stack_shared_experts(checkpoint, mesh),
        head=streams("hc_head"),
        norm=read("norm.weight"),
        unembedding=read("head.weight", field="unembedding"),
    )
    return config, parameters, checkpoint.experts(mesh=mesh, expert_axis=EXPERT_AXIS)


def _num_series(rate: int, config: Config) -> int:
    """F of a layer: the smaller rate of the model is that of sparse layers."""
    return 2 if rate and rate == min(filter(None, config.rates)) else 1


def empty_cache(config: Config, num_slots: int, length: int, dtype: Any, mesh: Mesh | None = None) -> Cache:
    """A cache for `num_slots` sequences of up to `length` tokens."""

    def zeros(*shape: int, dtype: Any = dtype) -> jax.Array:
        return place(jnp.zeros((num_slots, *shape), dtype), mesh, *SPLITS["cache"])

    def compressed(rate: int, size: int) -> Compressed:
        series = _num_series(rate, config)
        ring = (series * rate, series * size)
        return Compressed(zeros(*ring), zeros(*ring, dtype=jnp.float32), zeros(length // rate, size))

    return tuple(
        LayerCache(
            window=zeros(config.window, config.head_size),
            compressed=compressed(rate, config.head_size) if rate else None,
            index=compressed(rate, config.index_size) if _num_series(rate, config) == 2 else None,
        )
        for rate in config.rates
    )


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
    embedded = split(parameters.embedding[tokens], DATA)
    x = jnp.repeat(embedded[:, None], config.num_streams, axis=1)
    written = []
    for i, (layer, layer_cache) in enumerate(zip(parameters.layers, cache, strict=True)):
        collapsed, mix = collapse(config, layer.attention_streams, x)
        normalized = rms_norm(collapsed, layer.attention_norm, config.epsilon)
        added, layer_cache = attend(config, normalized, layer, config.rates[i], layer_cache, positions)
        written.append(layer_cache)
        x = mix(split(added, DATA))

        collapsed, mix = collapse(config, layer.mlp_streams, x)
        normalized = split(rms_norm(collapsed, layer.mlp_norm, config.epsilon), DATA)
        logits = jnp.matmul(normalized.astype(jnp.float32), layer.router.T, precision="highest")
        hashed = {} if layer.hash_table is None else {"token_ids": tokens, "hash_table": layer.hash_table}
        ids, weights = mm.route(logits, bias=layer.router_bias, **hashed, **config.route_options)
        ids = jnp.where(is_used[:, None], ids, -1)
        of_layer = experts[i] if isinstance(experts, tuple) else experts
        shared = parameters.shared[i] if isinstance(parameters.shared, tuple) else parameters.shared
        clamp = config.moe_options.get("activation_clamp")
        routed = apply_experts(of_layer, normalized, ids, weights, i, **config.moe_options)
        x = mix(split(routed + apply_shared_experts(shared, normalized, is_used, i, activation_clamp=clamp), DATA))
    gates = _stream_gates(config, parameters.head, x)
    weights = jax.nn.sigmoid(gates * parameters.head.scale + parameters.head.base) + config.stream_epsilon
    last = rms_norm(_weigh(weights, x), parameters.norm, config.epsilon)
    logits = jnp.einsum("bh,vh->bv", last, parameters.unembedding, preferred_element_type=jnp.float32)
    return logits, tuple(written)


def _stream_gates(config: Config, streams: Streams, x: jax.Array) -> jax.Array:
    """f32[B, ...] of streams x[B, M, H]."""
    flat = _unit(x.reshape(len(x), -1).astype(jnp.float32), config.epsilon)
    return jnp.matmul(flat, streams.function.T, precision="highest")


def _unit(x: jax.Array, epsilon: float) -> jax.Array:
    """RMS norm without a gain."""
    return rms_norm(x, jnp.ones((), x.dtype), epsilon)


def _weigh(weights: jax.Array, x: jax.Array) -> jax.Array:
    """[B, H]: the sum of streams x[B, M, H] with weights f32[B, M]."""
    return jnp.sum(weights[..., None] * x, axis=1).astype(x.dtype)


def collapse(config: Config, streams: Streams, x: jax.Array) -> tuple[jax.Array, Any]:
    """The input [B, H] of a block, and the function that gives the next streams for its output [B, H].

    Output goes to each stream with a weight, and streams are mixed by a matrix whose rows and columns sum to 1, made
    so by Sinkhorn and Knopp's steps, lest they grow from layer to layer.
    """
    m, epsilon = config.num_streams, config.stream_epsilon
    gates = _stream_gates(config, streams, x)
    scale = jnp.repeat(streams.scale, np.array([m, m, m * m]), total_repeat_length=(2 + m) * m)
    before, after, between = jnp.split(gates * scale + streams.base, [m, 2 * m], axis=-1)
    matrix = jax.nn.softmax(between.reshape(-1, m, m), axis=-1) + epsilon
    matrix /= matrix.sum(axis=-2, keepdims=True) + epsilon
    for _ in range(config.sinkhorn_steps - 1):
        matrix /= matrix.sum(axis=-1, keepdims=True) + epsilon
        matrix /= matrix.sum(axis=-2, keepdims=True) + epsilon

    def mix(output: jax.Array) -> jax.Array:
        """[B, M, H]"""
        spread = (2 * jax.nn.sigmoid(after)).astype(x.dtype)[..., None] * output[:, None]
        return split(spread + jnp.einsum("bjk,bjh->bkh", matrix.astype(x.dtype), x), DATA)

    return _weigh(jax.nn.sigmoid(before) + epsilon, x), mix


def attend(
    config: Config, x: jax.Array, layer: Layer, rate: int, cache: LayerCache, positions: jax.Array
) -> tuple[jax.Array, LayerCache]:
    """What attention makes of x[B, H], and the cache with this position in it."""
    rope = config.compressed_rope if rate else config.rope
    # V4 does not scale what YaRN turns.
    frequencies = rotary_frequencies(rope, config.rope_size)[0]
    cos, sin = angles(positions, frequencies, 1.0)
    latent = rms_norm(jnp.einsum("bh,qh->bq", x, layer.query_down), layer.query_norm, config.epsilon)
    query = _unit(jnp.einsum("bq,ndq->bnd", latent, layer.query_up), config.epsilon)
    query = rotate_last(query, cos, sin)
    kv = rms_norm(jnp.einsum("bh,dh->bd", x, layer.kv), layer.kv_norm, config.epsilon)
    kv = rotate_last(kv[:, None], cos, sin)[:, 0]
    window = _write(cache.window, _place(positions, config.window), kv)
    # Place w holds the last position that is w modulo W, if there was one.
    age = (positions[:, None] - jnp.arange(config.window)) % config.window
    keys, visible = window, age <= jnp.maximum(positions, 0)[:, None]

    compressed, index = cache.compressed, cache.index
    if layer.compressor is not None and compressed is not None:
        compressed = compress(config, x, layer.compressor, rate, compressed, positions, frequencies)
        num_entries = ((positions + 1) // rate)[:, None]
        seen = jnp.arange(compressed.entries.shape[1]) < num_entries
        if layer.indexer is not None and index is not None:
            index = compress(config, x, layer.indexer.compressor, rate, index, positions, frequencies)
            scores = index_scores(config, x, latent, layer.indexer, index.entries, cos, sin)
            seen &= _is_chosen(jnp.where(seen, scores, -jnp.inf), config.num_chosen)
        keys = jnp.concatenate([keys, compressed.entries], axis=1)
        visible = jnp.concatenate([visible, seen], axis=1)

    scores = jnp.einsum("bnd,bsd->bns", query, keys, preferred_element_type=jnp.float32) * config.head_size**-0.5
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    # A sink takes its share of attention, and gives nothing.
    sinks = jnp.broadcast_to(layer.sinks[None, :, None], (*scores.shape[:2], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
    mixed = jnp.einsum("bns,bsd->bnd", weights.astype(x.dtype), keys)
    # Keys are values, and were turned: turned back from here, what they give depends on the distance only.
    mixed = rotate_last(mixed, cos, -sin).reshape(len(x), config.num_groups, -1)
    grouped = jnp.einsum("bgd,gpd->bgp", mixed, layer.out_down)
    return jnp.einsum("bgp,hgp->bh", grouped, layer.out_up), LayerCache(window, compressed, index)


def rotate_last(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x[B, heads, size] with its last dimensions turned, neighbours as pairs, which stay where they are."""
    size = 2 * cos.shape[-1]
    pairs = x[..., -size:].astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([x[..., :-size], turned.reshape(*x.shape[:-1], size).astype(x.dtype)], axis=-1)


def compress(
    config: Config,
    x: jax.Array,
    weights: Compressor,
    rate: int,
    cache: Compressed,
    positions: jax.Array,
    frequencies: np.ndarray[Any, Any],
) -> Compressed:
    """Keeps what x[B, H] gives; where it is the last of its window also the window's entry, turned to its beginning.

    An entry is the sum of values, weighed by a softmax of gates over positions, for each column.
    """
    size, ring = weights.norm.shape[0], cache.kv.shape[1]
    kv = jnp.einsum("bh,ch->bc", x, weights.kv)
    gate = jnp.einsum("bh,ch->bc", x, weights.gate) + weights.bias[positions % rate]
    kept_kv = _write(cache.kv, _place(positions, ring), kv)
    kept_gate = _write(cache.gate, _place(positions, ring), gate)

    windows = positions // rate
    # The positions that make the entry: of its window, and with two series of the one before.
    sources = (windows * rate + rate - ring)[:, None] + jnp.arange(ring)
    places = (sources % ring)[..., None]
    is_before = (jnp.arange(ring) < ring - rate)[:, None]

    def of_window(kept: jax.Array) -> jax.Array:
        """[B, F rate, C]: the first series of the window before, the last one of this window."""
        ordered = jnp.take_along_axis(kept, places, axis=1)
        return jnp.where(is_before, ordered[..., :size], ordered[..., -size:])

    gates = jnp.where((sources >= 0)[..., None], of_window(kept_gate).astype(jnp.float32), -jnp.inf)
    # An empty slot has no sources: zeros instead of a softmax of nothing.
    shares = jnp.where((positions >= 0)[:, None, None], jax.nn.softmax(gates, axis=1), 0)
    entry = jnp.sum(of_window(kept_kv) * shares.astype(x.dtype), axis=1)
    entry = rms_norm(entry, weights.norm, config.epsilon)
    entry = rotate_last(entry[:, None], *angles(windows * rate, frequencies, 1.0))[:, 0]
    is_last = (positions >= 0) & ((positions + 1) % rate == 0)
    return Compressed(kept_kv, kept_gate, _write(cache.entries, jnp.where(is_last, windows, -1), entry))


def index_scores(
    config: Config,
    x: jax.Array,
    latent: jax.Array,
    indexer: Indexer,
    entries: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
) -> jax.Array:
    """f32[B, T]: how much each token wants each entry."""
    query = rotate_last(jnp.einsum("bq,jcq->bjc", latent, indexer.query_up), cos, sin)
    scores = jnp.einsum("bjc,btc->bjt", query, entries, preferred_element_type=jnp.float32)
    scores = jax.nn.relu(scores) * config.index_size**-0.5
    weights = jnp.einsum("bh,jh->bj", x, indexer.weights).astype(jnp.float32) * config.num_index_heads**-0.5
    return jnp.einsum("bjt,bj->bt", scores, weights)


def _is_chosen(scores: jax.Array, count: int) -> jax.Array:
    """bool[B, T]: the `count` best of scores [B, T]."""
    _, chosen = jax.lax.top_k(scores, min(count, scores.shape[1]))
    return jnp.zeros(scores.shape, bool).at[jnp.arange(len(scores))[:, None], chosen].set(True)


def _place(positions: jax.Array, size: int) -> jax.Array:
    """Of a position in a ring; -1 in empty slots."""
    return jnp.where(positions < 0, -1, positions % size)


def _write(cache: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
    """cache[B, S, C] with values [B, C] at places int32[B]; -1 is none."""
    at = cache.at[jnp.arange(len(values)), places]
    return at.set(values.astype(cache.dtype), mode="drop", wrap_negative_indices=False)


def main() -> None:
    """Continues prompts of token ids."""
    command.main(__doc__, load, empty_cache, decode_step)


if __name__ == "__main__":
    main()
