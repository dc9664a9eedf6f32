"""DeepSeek-V4 in pure JAX: attention over a window and compressed positions, streams for a residual, hash layers.

    python -m examples.deepseek_v4 DeepSeek-V4-Flash --prompt 0,671,6102 --mesh 1x8

A layer attends to the last positions, and, most of them, to entries that each stand for `rate` positions before. With
a rate of 4 ("sparse") an entry is made of two windows, and an indexer chooses which entries a token sees; with 128
("heavy") of one, and all are seen. Keys are values, one head for all queries. Layers are of several kinds, sparse and
heavy in turns but for the first: two of them are one step of a scan (`Config.runs`).

Shapes: B slots, H hidden_size, M streams, E experts, k experts of a token, V vocabulary; and those of
`deepseek_v4_attention.py`.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jax_megamoe as mm
from examples import command
from examples.deepseek_v4_attention import (
    Attention,
    Compressed,
    Compressor,
    Config,
    Indexer,
    LayerCache,
    Run,
    attend,
    num_series,
    unit_norm,
)
from examples.dense import DenseWeights, open_checkpoint
from examples.experts import Experts, apply_experts, run_layers
from examples.meshes import DATA, EXPERT_AXIS, TENSOR, place, place_cache, split
from examples.transformer import empty_leaf, layer_of_cache, rms_norm, with_layer_of_cache

_STEPS_OF_A_ROUND = 3  # of Sinkhorn and Knopp's


class Streams(NamedTuple):
    """How M streams become the input of a block, and take in its output; of the head: how they become one."""

    function: jax.Array  # f32[(2 + M) M, M H], the head's [M, M H]
    base: jax.Array  # f32[(2 + M) M], [M]
    scale: jax.Array  # f32[3], [1]


class Layer(NamedTuple):
    """A layer without its experts."""

    attention_streams: Streams
    attention_norm: jax.Array  # [H]
    attention: Attention
    mlp_streams: Streams
    mlp_norm: jax.Array  # [H]
    router: jax.Array  # f32[E, H]
    router_bias: jax.Array | None  # f32[E]
    hash_table: jax.Array | None  # int32[V, k]


class Parameters(NamedTuple):
    """The model without its routed experts."""

    embedding: jax.Array  # [V, H]
    layers: tuple[tuple[Layer, ...], ...]  # of each run, its kinds, stacked
    shared: Experts  # stacked
    head: Streams
    norm: jax.Array  # [H]
    unembedding: jax.Array  # [V, H]


Cache = tuple[tuple[LayerCache, ...], ...]  # as the layers, of leaves as `CacheLeaf` is

# How arrays are split over a mesh, those of layers stacked: what is not named is whole on each device. The indexer has
# other fields of these names, which are whole.
SPLITS: dict[str, tuple[str | None, ...]] = {
    "query_up": (None, TENSOR),
    "sinks": (None, TENSOR),
    "out_down": (None, TENSOR),
    "out_up": (None, None, TENSOR),
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
    """Reads a checkpoint onto the devices, as `deepseek_v3.load`."""
    checkpoint = open_checkpoint(folder, experts_folder, "deepseek_v4")
    last = checkpoint.moe_layers[-1]
    config = Config.of(checkpoint.config, checkpoint.router(last).options, checkpoint.moe_options(last))
    dense = DenseWeights(folder, dtype)

    def read(name: str, *shape: int, dtype: Any = None) -> Any:
        """A NumPy array: `stack_layers` and `place` make jax's of it."""
        return dense.read(name, *shape, dtype=dtype)

    def streams(stem: str) -> Streams:
        return Streams(*(read(f"{stem}_{name}", dtype=np.float32) for name in ("fn", "base", "scale")))

    def compressor(stem: str) -> Compressor:
        bias = read(f"{stem}.ape", dtype=np.float32)
        return Compressor(read(f"{stem}.wkv.weight"), read(f"{stem}.wgate.weight"), bias, read(f"{stem}.norm.weight"))

    def attention_of(number: int) -> Attention:
        stem, rate = f"layers.{number}.attn", config.rates[number]
        indexer = None
        if num_series(rate, config) == 2:
            query_up = read(f"{stem}.indexer.wq_b.weight", config.num_index_heads, config.index_size, -1)
            weights = read(f"{stem}.indexer.weights_proj.weight")
            indexer = Indexer(compressor(f"{stem}.indexer.compressor"), query_up, weights)
        heads, groups = (config.num_heads, config.head_size), config.num_groups
        group_size = config.num_heads * config.head_size // groups
        return Attention(
            query_down=read(f"{stem}.wq_a.weight"),
            query_norm=read(f"{stem}.q_norm.weight"),
            query_up=read(f"{stem}.wq_b.weight", *heads, -1),
            kv=read(f"{stem}.wkv.weight"),
            kv_norm=read(f"{stem}.kv_norm.weight"),
            sinks=read(f"{stem}.attn_sink", dtype=np.float32),
            compressor=compressor(f"{stem}.compressor") if rate else None,
            indexer=indexer,
            out_down=read(f"{stem}.wo_a.weight", groups, -1, group_size),
            out_up=read(f"{stem}.wo_b.weight", config.hidden_size, groups, -1),
        )

    def layer(number: int) -> Layer:
        stem, router = f"layers.{number}", checkpoint.router(number)
        return Layer(
            attention_streams=streams(f"{stem}.hc_attn"),
            attention_norm=read(f"{stem}.attn_norm.weight"),
            attention=attention_of(number),
            mlp_streams=streams(f"{stem}.hc_ffn"),
            mlp_norm=read(f"{stem}.ffn_norm.weight"),
            router=router.weight,
            router_bias=router.bias,
            hash_table=router.hash_table,
        )

    parameters = Parameters(
        embedding=place(read("embed.weight"), mesh),
        layers=stack_layers(config, layer, mesh),
        shared=checkpoint.shared_experts(mesh=mesh),
        head=Streams(*(place(array, mesh) for array in streams("hc_head"))),
        norm=place(read("norm.weight"), mesh),
        unembedding=place(read("head.weight"), mesh, *SPLITS["unembedding"]),
    )
    return config, parameters, checkpoint.experts(mesh=mesh, expert_axis=EXPERT_AXIS)


def stack_layers(config: Config, layer: Callable[[int], Layer], mesh: Mesh | None = None) -> tuple[Any, ...]:
    """What `Parameters.layers` is, from a function that makes a layer by its number."""

    def stack(path: Any, *leaves: Any) -> jax.Array:
        is_whole = any(key.name == "indexer" for key in path)
        of_layers = np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)
        return place(of_layers, mesh, *(() if is_whole else SPLITS.get(path[-1].name, ())))

    def stacked(numbers: Sequence[int]) -> Layer:
        return jax.tree_util.tree_map_with_path(stack, *map(layer, numbers))

    return tuple(tuple(stacked(numbers) for numbers in run.numbers()) for run in config.runs)


def empty_cache(config: Config, num_slots: int, length: int, dtype: Any, mesh: Mesh | None = None) -> Cache:
    """A cache for `num_slots` sequences of up to `length` tokens."""

    def zeros(count: int, *shape: int, dtype: Any = dtype) -> Any:
        leaf = empty_leaf(count, (num_slots, *shape), dtype, not config.is_unrolled)
        return place_cache(leaf, mesh, *SPLITS["cache"])

    def compressed(count: int, rate: int, size: int) -> Compressed:
        series = num_series(rate, config)
        ring = (series * rate, series * size)
        return Compressed(
            zeros(count, *ring), zeros(count, *ring, dtype=jnp.float32), zeros(count, length // rate, size)
        )

    def of_kind(count: int, rate: int) -> LayerCache:
        return LayerCache(
            window=zeros(count, config.window, config.head_size),
            compressed=compressed(count, rate, config.head_size) if rate else None,
            indexed=compressed(count, rate, config.index_size) if num_series(rate, config) == 2 else None,
        )

    return tuple(tuple(of_kind(run.repeats, config.rates[each[0]]) for each in run.numbers()) for run in config.runs)


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

    def add_layer(x: jax.Array, cache: LayerCache, i: int | jax.Array, rate: int, layer: Layer) -> Any:
        collapsed, mix = collapse(config, layer.attention_streams, x)
        normalized = rms_norm(collapsed, layer.attention_norm, config.epsilon)
        added, cache = attend(config, normalized, layer.attention, rate, cache, positions)
        x = mix(split(added, DATA))

        collapsed, mix = collapse(config, layer.mlp_streams, x)
        normalized = split(rms_norm(collapsed, layer.mlp_norm, config.epsilon), DATA)
        logits = jnp.matmul(normalized.astype(jnp.float32), layer.router.T, precision="highest")
        hashed: dict[str, Any] = (
            {} if layer.hash_table is None else {"token_ids": tokens, "hash_table": layer.hash_table}
        )
        ids, weights = mm.route(logits, bias=layer.router_bias, **hashed, **config.route_options)
        ids = jnp.where(is_used[:, None], ids, -1)
        of_layer, shared = (each[i] if isinstance(each, tuple) else each for each in (experts, parameters.shared))
        results = apply_experts(of_layer, normalized, ids, weights, i, shared=shared, **config.moe_options)
        return mix(split(results, DATA)), cache

    def add_period(run: Run, x: jax.Array, caches: Any, n: int | jax.Array, layers: tuple[Layer, ...]) -> Any:
        """A layer of each kind."""
        written = []
        for kind, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
            i, rate = run.first + run.period * n + kind, config.rates[run.first + kind]
            x, of_layer = add_layer(x, layer_of_cache(cache, n), i, rate, layer)
            written.append(with_layer_of_cache(cache, n, of_layer))
        return x, tuple(written)

    is_unrolled = config.is_unrolled or isinstance(experts, tuple) or isinstance(parameters.shared, tuple)
    written = []
    for run, layers, caches in zip(config.runs, parameters.layers, cache, strict=True):
        add = functools.partial(add_period, run)
        x, caches = run_layers(add, x, caches, layers, is_unrolled=is_unrolled or run.repeats == 1)
        written.append(caches)
    gates = _stream_gates(config, parameters.head, x)
    weights = jax.nn.sigmoid(gates * parameters.head.scale + parameters.head.base) + config.stream_epsilon
    last = rms_norm(_weigh(weights, x), parameters.norm, config.epsilon)
    logits = jnp.einsum("bh,vh->bv", last, parameters.unembedding, preferred_element_type=jnp.float32)
    return logits, tuple(written)


def _stream_gates(config: Config, streams: Streams, x: jax.Array) -> jax.Array:
    """f32[B, ...] of streams x[B, M, H]."""
    flat = unit_norm(x.reshape(len(x), -1).astype(jnp.float32), config.epsilon)
    return jnp.matmul(flat, streams.function.T, precision="highest")


def _weigh(weights: jax.Array, x: jax.Array) -> jax.Array:
    """[B, H]: the sum of streams x[B, M, H] with weights f32[B, M]."""
    return jnp.sum(weights[..., None] * x, axis=1).astype(x.dtype)


def _doubly_stochastic(config: Config, matrix: jax.Array) -> jax.Array:
    """Positive f32[B, M, M] -> rows and columns that sum to 1, by Sinkhorn and Knopp's steps: columns, then rows.

    Each element is an array of its own, so that XLA for GPUs makes one kernel of a round of steps. Sums along an axis
    are three kernels and a copy for each step, which with 20 steps, twice a layer, are three quarters of what a layer
    launches. All steps in one round would take XLA half a minute to compile.
    """
    epsilon, each = config.stream_epsilon, range(config.num_streams)
    rounds, left = divmod(max(config.sinkhorn_steps - 1, 0), _STEPS_OF_A_ROUND)

    def balance_columns(rows: list[list[jax.Array]]) -> list[list[jax.Array]]:
        sums = [sum(row[k] for row in rows) + epsilon for k in each]
        return [[row[k] / sums[k] for k in each] for row in rows]

    def balance_rows(rows: list[list[jax.Array]]) -> list[list[jax.Array]]:
        return [[value / (sum(row) + epsilon) for value in row] for row in rows]

    def steps(matrix: jax.Array, count: int) -> list[list[jax.Array]]:
        rows = [[matrix[:, j, k] for k in each] for j in each]
        for _ in range(count):
            rows = balance_rows(balance_columns(rows))
        return rows

    def joined(rows: list[list[jax.Array]]) -> jax.Array:
        return jnp.stack([value for row in rows for value in row], axis=-1).reshape(matrix.shape)

    matrix = jax.lax.fori_loop(0, rounds, lambda _, matrix: joined(steps(matrix, _STEPS_OF_A_ROUND)), matrix)
    return joined(balance_columns(steps(matrix, left)))


def collapse(config: Config, streams: Streams, x: jax.Array) -> tuple[jax.Array, Any]:
    """The input [B, H] of a block, and the function that gives the next streams for its output [B, H].

    Output goes to each stream with a weight, and streams are mixed by a matrix whose rows and columns sum to 1, made
    so by Sinkhorn and Knopp's steps, lest they grow from layer to layer.
    """
    m, epsilon = config.num_streams, config.stream_epsilon
    gates = _stream_gates(config, streams, x)
    scale = jnp.repeat(streams.scale, np.array([m, m, m * m]), total_repeat_length=(2 + m) * m)
    before, after, between = jnp.split(gates * scale + streams.base, [m, 2 * m], axis=-1)
    matrix = _doubly_stochastic(config, jax.nn.softmax(between.reshape(-1, m, m), axis=-1) + epsilon)

    def mix(output: jax.Array) -> jax.Array:
        """[B, M, H]"""
        spread = (2 * jax.nn.sigmoid(after)).astype(x.dtype)[..., None] * output[:, None]
        return split(spread + jnp.einsum("bjk,bjh->bkh", matrix.astype(x.dtype), x), DATA)

    return _weigh(jax.nn.sigmoid(before) + epsilon, x), mix


def main() -> None:
    """Continues prompts of token ids."""
    command.main(__doc__, load, empty_cache, decode_step)


if __name__ == "__main__":
    main()
