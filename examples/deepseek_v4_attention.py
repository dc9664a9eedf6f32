"""Attention of DeepSeek-V4: over a window, and over entries that each stand for several positions before.

Shapes: B slots, H hidden_size, N heads, D head_size, Q the rank of queries, G groups of heads of rank P, W positions of
the window, T entries of the cache, J heads of the indexer, C size of an entry.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.meshes import DATA, split
from examples.transformer import angles, rms_norm, rotary_frequencies

SPARSE, HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a model, from its config.json."""

    num_layers: int
    hidden_size: int
    num_heads: int
    head_size: int
    rope_size: int
    window: int
    rates: tuple[int, ...]  # positions of an entry in each layer, 0 for layers without entries
    sparse_rate: int  # that of layers with an indexer
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
    is_hashed: tuple[bool, ...]  # which layers choose experts by a hash of the token, most often the first
    is_unrolled: bool = False  # no scan, and a cache for each layer: see `run_layers`

    @property
    def runs(self) -> tuple["Run", ...]:
        """All layers in order: those of one kind, or of two in turns, together as far as they go."""
        kinds = list(zip(self.rates, self.is_hashed, strict=True))
        runs: list[Run] = []
        while (first := sum(run.period * run.repeats for run in runs)) < len(kinds):
            found = [Run(first, period, _repeats(kinds[first:], period)) for period in (1, 2)]
            longest = max(found, key=lambda run: run.period * run.repeats)
            runs.append(longest if longest.repeats > 1 else Run(first, 1, 1))
        return tuple(runs)

    @staticmethod
    def of(fields: Mapping[str, Any], route_options: Mapping[str, Any], moe_options: Mapping[str, Any]) -> "Config":
        """From config.json and the options of the checkpoint's expert layers."""
        rates, by_type = fields.get("compress_ratios"), fields.get("compress_rates") or {SPARSE: 4, HEAVY: 128}
        if rates is None:
            rates = [by_type.get(kind, 0) for kind in fields["layer_types"]]
        scaling = fields.get("rope_scaling") or {}
        num_hashed = fields.get("num_hash_layers") or fields.get("n_hash_layers") or 0
        is_hashed = [number < num_hashed for number in range(fields["num_hidden_layers"])]
        if fields.get("mlp_layer_types") is not None:
            is_hashed = [kind == "hash_moe" for kind in fields["mlp_layer_types"]]
        return Config(
            num_layers=fields["num_hidden_layers"],
            hidden_size=fields["hidden_size"],
            num_heads=fields["num_attention_heads"],
            head_size=fields["head_dim"],
            rope_size=fields["qk_rope_head_dim"],
            window=fields["sliding_window"],
            rates=tuple(rates[: fields["num_hidden_layers"]]),
            sparse_rate=by_type[SPARSE],
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
            is_hashed=tuple(is_hashed[: fields["num_hidden_layers"]]),
        )


class Run(NamedTuple):
    """Layers from `first` on, of `period` kinds in turns, `repeats` times: they go through one scan."""

    first: int
    period: int
    repeats: int

    def numbers(self) -> list[range]:
        """The layers of each kind."""
        end = self.first + self.period * self.repeats
        return [range(first, end, self.period) for first in range(self.first, self.first + self.period)]


def _repeats(kinds: Sequence[Any], period: int) -> int:
    """How often the first `period` of them stand at the beginning, one after the other."""
    count = 1
    while kinds[period * count : period * (count + 1)] == kinds[:period]:
        count += 1
    return count


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


class Attention(NamedTuple):
    """Attention of a layer."""

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


class Compressed(NamedTuple):
    """What a compressor keeps: keys and gates of the last F windows by position, and the entries."""

    kv: jax.Array  # [B, F rate, F C]
    gate: jax.Array  # f32[B, F rate, F C]
    entries: jax.Array  # [B, T, C]


class LayerCache(NamedTuple):
    """Of one layer; position p is in place p % W of the window."""

    window: jax.Array  # [B, W, D]
    compressed: Compressed | None
    indexed: Compressed | None


def num_series(rate: int, config: Config) -> int:
    """F of a layer."""
    return 2 if rate == config.sparse_rate else 1


def unit_norm(x: jax.Array, epsilon: float) -> jax.Array:
    """RMS norm without a gain."""
    return rms_norm(x, jnp.ones((), x.dtype), epsilon)


def attend(
    config: Config, x: jax.Array, layer: Attention, rate: int, cache: LayerCache, positions: jax.Array
) -> tuple[jax.Array, LayerCache]:
    """What attention makes of x[B, H], and the cache with this position in it."""
    rope = config.compressed_rope if rate else config.rope
    # V4 does not scale what YaRN turns.
    frequencies = rotary_frequencies(rope, config.rope_size)[0]
    cos, sin = angles(positions, frequencies, 1.0)
    latent = rms_norm(jnp.einsum("bh,qh->bq", x, layer.query_down), layer.query_norm, config.epsilon)
    query = unit_norm(jnp.einsum("bq,ndq->bnd", latent, layer.query_up), config.epsilon)
    query = rotate_last(query, cos, sin)
    kv = rms_norm(jnp.einsum("bh,dh->bd", x, layer.kv), layer.kv_norm, config.epsilon)
    kv = rotate_last(kv[:, None], cos, sin)[:, 0]
    window = _write(cache.window, _place(positions, config.window), kv)
    # Place w holds the last position that is w modulo W, if there was one.
    age = (positions[:, None] - jnp.arange(config.window)) % config.window
    keys, visible = window, age <= jnp.maximum(positions, 0)[:, None]

    compressed, indexed = cache.compressed, cache.indexed
    if layer.compressor is not None and compressed is not None:
        compressed = compress(config, x, layer.compressor, rate, compressed, positions, frequencies)
        num_entries = ((positions + 1) // rate)[:, None]
        seen = jnp.arange(compressed.entries.shape[1]) < num_entries
        if layer.indexer is not None and indexed is not None:
            indexed = compress(config, x, layer.indexer.compressor, rate, indexed, positions, frequencies)
            scores = split(index_scores(config, x, latent, layer.indexer, indexed.entries, cos, sin), DATA)
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
    return jnp.einsum("bgp,hgp->bh", grouped, layer.out_up), LayerCache(window, compressed, indexed)


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
    # Every device has all heads of the indexer, so that none has to wait for the others' before it chooses.
    query = split(rotate_last(jnp.einsum("bq,jcq->bjc", latent, indexer.query_up), cos, sin), DATA)
    scores = jnp.einsum("bjc,btc->bjt", query, entries, preferred_element_type=jnp.float32)
    scores = jax.nn.relu(scores) * config.index_size**-0.5
    weights = jnp.einsum("bh,jh->bj", x, indexer.weights).astype(jnp.float32) * config.num_index_heads**-0.5
    return jnp.einsum("bjt,bj->bt", scores, weights)


def _is_chosen(scores: jax.Array, count: int) -> jax.Array:
    """bool[B, T]: the `count` best of scores [B, T], of equal ones the first.

    By a sort, since XLA gathers all slots for a `top_k`.
    """
    if count >= scores.shape[1]:
        return jnp.ones(scores.shape, bool)
    least = jnp.sort(scores, axis=-1)[:, -count, None]
    is_equal = scores == least
    num_left = count - jnp.sum(scores > least, axis=-1, keepdims=True)
    return (scores > least) | (is_equal & (jnp.cumsum(is_equal, axis=-1) <= num_left))


def _place(positions: jax.Array, size: int) -> jax.Array:
    """Of a position in a ring; -1 in empty slots."""
    return jnp.where(positions < 0, -1, positions % size)


def _write(cache: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
    """cache[B, S, C] with values [B, C] at places int32[B]; -1 is none."""
    at = cache.at[jnp.arange(len(values)), places]
    return at.set(values.astype(cache.dtype), mode="drop", wrap_negative_indices=False)
