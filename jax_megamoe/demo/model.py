"""The network: pre-norm transformer blocks of rotary attention and a mixture of experts, layers stacked and scanned.

The same block serves training and evaluation (`forward`, a whole sequence at once) and decoding (`decode_step`, one
position with a key/value cache), and both kinds of experts: `FloatExperts`, which can be differentiated, and
`jax_megamoe.ExpertWeights` of all layers stacked, which go through `jax_megamoe.moe`.

Shapes: B sequences, S positions, H hidden_size, I intermediate_size, E num_experts, L num_layers, N num_heads, D
head_size, V vocabulary_size.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.options import Implementation
from jax_megamoe.weight_layout import Format


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; `hidden_size` and `intermediate_size` are multiples of 128, as the kernel wants them."""

    vocabulary_size: int = 96
    hidden_size: int = 256
    intermediate_size: int = 128
    num_layers: int = 3
    num_heads: int = 8
    num_experts: int = 8
    top_k: int = 2
    context: int = 128

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class FloatExperts(NamedTuple):
    """Experts of all layers in float32: `gate`, `up` [L, E, I, H] and `down` [L, E, H, I]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


class Blocks(NamedTuple):
    """All that the layers hold besides their experts, float32 with a leading L."""

    attention_norm: jax.Array  # [L, H]
    qkv: jax.Array  # [L, H, 3, N, D], so that heads can be split
    attention_out: jax.Array  # [L, N, D, H]
    expert_norm: jax.Array  # [L, H]
    router: jax.Array  # [L, H, E]


class Parameters(NamedTuple):
    """The float model, as it is trained and saved."""

    embedding: jax.Array  # [V, H]
    blocks: Blocks
    experts: FloatExperts
    final_norm: jax.Array  # [H]
    unembedding: jax.Array  # [H, V]


class Routing(NamedTuple):
    """What the router of one layer decided."""

    scores: jax.Array  # f32[..., E], softmax over all experts
    ids: jax.Array  # int32[..., k]


class Cache(NamedTuple):
    """Keys and values of the last `context` positions, position p in slot p % context.

    Both are f32[L, B, context, N, D]; inside one layer they come without the L.
    """

    keys: jax.Array
    values: jax.Array


Experts = FloatExperts | mm.ExpertWeights


def initialize(config: ModelConfig, key: jax.Array) -> Parameters:
    """Random parameters; what each layer adds to the residual stream starts small."""
    h, i, e, layers = config.hidden_size, config.intermediate_size, config.num_experts, config.num_layers
    heads = (config.num_heads, config.head_size)
    keys = iter(jax.random.split(key, 8))

    def normal(*shape: int, fan_in: int, gain: float = 1.0) -> jax.Array:
        return gain / math.sqrt(fan_in) * jax.random.normal(next(keys), shape, jnp.float32)

    residual_gain = (2 * layers) ** -0.5
    return Parameters(
        embedding=normal(config.vocabulary_size, h, fan_in=1, gain=0.5),
        blocks=Blocks(
            attention_norm=jnp.ones((layers, h)),
            qkv=normal(layers, h, 3, *heads, fan_in=h),
            attention_out=normal(layers, *heads, h, fan_in=h, gain=residual_gain),
            expert_norm=jnp.ones((layers, h)),
            router=normal(layers, h, e, fan_in=h),
        ),
        experts=FloatExperts(
            gate=normal(layers, e, i, h, fan_in=h),
            up=normal(layers, e, i, h, fan_in=h),
            down=normal(layers, e, h, i, fan_in=i, gain=residual_gain),
        ),
        final_norm=jnp.ones(h),
        unembedding=jnp.zeros((h, config.vocabulary_size)),
    )


def quantize(experts: FloatExperts, format: Format = "fp8_block") -> mm.ExpertWeights:
    """Quantised experts of all layers, stacked, for the `layer` argument of `moe`."""
    per_layer = [
        mm.quantize_experts(*(leaf[layer] for leaf in experts), format=format) for layer in range(len(experts.gate))
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_layer)


def split[Tree](tree: Tree, *spec: str | None) -> Tree:
    """The tree with its leading dimensions split so, or whole on each device; as it is in a program without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, P(*spec))


def _normalize(x: jax.Array, gain: jax.Array) -> jax.Array:
    return gain * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding of x[..., S, heads, head_size] at positions[S], so that attention sees distances only."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 1e4 ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attend(queries: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax attention of [B, S, heads, head_size] over [B, N, heads, head_size], with visible[S, N]."""
    scores = jnp.einsum("bqnd,bknd->bnqk", queries, keys) * queries.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnqk,bknd->bqnd", weights, values)


def float_moe(
    x: jax.Array, layer: FloatExperts, topk_ids: jax.Array, topk_weights: jax.Array, capacity: int
) -> jax.Array:
    """The expert layer in float, differentiable: tokens are gathered into `capacity` rows per expert.

    (token, slot) pairs that find their expert full contribute nothing. A capacity of the number of tokens drops none.
    """
    num_experts, _, hidden_size = layer.gate.shape
    top_k = topk_ids.shape[-1]
    tokens = x.reshape(-1, hidden_size)
    pair_experts = topk_ids.reshape(-1)

    chosen = jax.nn.one_hot(pair_experts, num_experts, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(chosen, axis=0) - 1) * chosen, axis=-1)
    num_rows = num_experts * capacity
    # The row past the end stands for "no row": scatters to it are dropped and gathers from it give zeros.
    row_of_pair = jnp.where(place < capacity, pair_experts * capacity + place, num_rows)
    token_of_pair = jnp.arange(pair_experts.size, dtype=jnp.int32) // top_k
    token_of_row = jnp.full(num_rows, len(tokens), jnp.int32).at[row_of_pair].set(token_of_pair, mode="drop")

    rows = tokens.at[token_of_row].get(mode="fill", fill_value=0).reshape(num_experts, capacity, hidden_size)
    gate = jnp.einsum("ech,eih->eci", rows, layer.gate)
    up = jnp.einsum("ech,eih->eci", rows, layer.up)
    down = jnp.einsum("eci,ehi->ech", jax.nn.silu(gate) * up, layer.down).reshape(num_rows, hidden_size)
    results = down.at[row_of_pair].get(mode="fill", fill_value=0).reshape(*topk_ids.shape, hidden_size)
    return jnp.sum(results * topk_weights[..., None], axis=-2)


def _block(
    config: ModelConfig,
    x: jax.Array,
    block: Blocks,
    positions: jax.Array,
    attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
    moe: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, Any, Routing]:
    """One layer on x[B, S, H]; `attend` also returns what it wants kept of this layer."""
    queries, keys, values = jnp.einsum("bsh,hcnd->cbsnd", _normalize(x, block.attention_norm), block.qkv)
    mixed, kept = attend(_rotate(queries, positions), _rotate(keys, positions), values)
    # Over a mesh, heads and experts alone are split. Left to itself, XLA would also split the rest by the tokens that
    # `moe` wants, and put together what few they are at each turn between the two.
    x = split(x + jnp.einsum("bsnd,ndh->bsh", mixed, block.attention_out))

    normalized = split(_normalize(x, block.expert_norm))
    logits = normalized @ block.router
    topk_ids, topk_weights = split(mm.route(logits, top_k=config.top_k, scoring="softmax"))
    x = x + split(moe(normalized, topk_ids, topk_weights))
    return x, kept, Routing(jax.nn.softmax(logits), topk_ids)


def _run_blocks(
    config: ModelConfig,
    x: jax.Array,
    blocks: Blocks,
    experts: Experts,
    positions: jax.Array,
    attend: Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    state: Any,
    capacity_factor: float | None,
    implementation: Implementation | None,
) -> tuple[jax.Array, Any, Routing]:
    """Scans x[B, S, H] through the layers; `state` (leading L, or None) is what `attend` gets and gives back."""
    float_experts = experts if isinstance(experts, FloatExperts) else None
    num_tokens = x.shape[0] * x.shape[1]
    capacity = num_tokens
    if capacity_factor is not None:
        capacity = min(num_tokens, math.ceil(capacity_factor * num_tokens * config.top_k / config.num_experts))

    def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
        index, block, float_layer, layer_state = scanned

        def moe(x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array) -> jax.Array:
            if isinstance(experts, FloatExperts):
                return float_moe(x, float_layer, topk_ids, topk_weights, capacity)
            # The stacked weights stay whole and the kernel picks the layer: slicing them here would copy them.
            y = mm.moe(
                x.astype(jnp.bfloat16), experts, topk_ids, topk_weights, layer=index, implementation=implementation
            )
            return y.astype(x.dtype)

        def attend_layer(queries: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, Any]:
            return attend(queries, keys, values, layer_state)

        x, kept, routing = _block(config, x, block, positions, attend_layer, moe)
        return x, (kept, routing)

    layers = jnp.arange(config.num_layers, dtype=jnp.int32)
    x, (state, routing) = jax.lax.scan(body, x, (layers, blocks, float_experts, state))
    return x, state, routing


def _logits(parameters: Parameters, x: jax.Array) -> jax.Array:
    return _normalize(x, parameters.final_norm) @ parameters.unembedding


def forward(
    config: ModelConfig,
    parameters: Parameters,
    experts: Experts,
    tokens: jax.Array,
    *,
    capacity_factor: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, Routing]:
    """Logits f32[B, S, V] of the symbol after each of tokens int32[B, S], and the routing of all layers (leading L).

    `capacity_factor` (float experts only) bounds each expert to that multiple of its even share of the tokens, which
    makes training several times faster; None keeps every token. `implementation` is that of `jax_megamoe.moe`.
    """
    positions = jnp.arange(tokens.shape[1])
    visible = positions[:, None] >= positions[None, :]

    def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return _attend(queries, keys, values, visible), None

    x = parameters.embedding[tokens]
    x, _, routing = _run_blocks(
        config, x, parameters.blocks, experts, positions, attend, None, capacity_factor, implementation
    )
    return _logits(parameters, x), routing


def empty_cache(config: ModelConfig, num_sequences: int) -> Cache:
    """A cache for `decode_step` before position 0."""
    shape = (config.num_layers, num_sequences, config.context, config.num_heads, config.head_size)
    return Cache(jnp.zeros(shape), jnp.zeros(shape))


def decode_step(
    config: ModelConfig,
    parameters: Parameters,
    experts: Experts,
    tokens: jax.Array,
    position: jax.Array,
    cache: Cache,
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, Cache]:
    """Logits f32[B, V] after tokens int32[B] at `position` (int32[]), and the cache with them in it.

    Past `context` positions the oldest slot is overwritten, so a text of any length sees its last `context` symbols.
    """
    slot = position % config.context
    visible = (jnp.arange(config.context) <= position)[None, :]

    def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, layer: Cache) -> tuple[jax.Array, Cache]:
        layer = Cache(
            jax.lax.dynamic_update_slice_in_dim(layer.keys, keys, slot, axis=1),
            jax.lax.dynamic_update_slice_in_dim(layer.values, values, slot, axis=1),
        )
        return _attend(queries, layer.keys, layer.values, visible), layer

    x = parameters.embedding[tokens][:, None, :]
    x, cache, _ = _run_blocks(
        config, x, parameters.blocks, experts, position[None], attend, cache, None, implementation
    )
    return _logits(parameters, x[:, 0]), cache
