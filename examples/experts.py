"""The expert layer as the decoders call it: `jax_megamoe.moe`, or float experts by `jax.lax.ragged_dot` to compare.

Shapes: B tokens, H hidden_size, I intermediate_size, E experts, k experts of a token, S shared experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jax_megamoe as mm
from examples.meshes import EXPERT_AXIS, TOKEN_AXES


class FloatExperts(NamedTuple):
    """The experts of one layer in floating point, as `ragged_dot` wants them."""

    gate_up: jax.Array  # [E, H, 2I], gate's columns first
    down: jax.Array  # [E, I, H]


# Quantised experts of all layers are stacked, and `moe` reads a layer in place. Of float experts a program would copy
# a layer out of a stack, so they are a tuple of layers, and the loop over them is unrolled. None, or a tuple of None,
# leaves them out, to time the rest.
Experts = mm.ExpertWeights | tuple[FloatExperts | None, ...] | None
LayerExperts = mm.ExpertWeights | FloatExperts | None


def dequantize(weights: mm.ExpertWeights, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[FloatExperts, ...]:
    """The exact values of stacked `fp8_block` or `mxfp4` weights."""
    gate_up, gate_up_scale, down, down_scale = weights.unpack()

    def values(matrix: jax.Array, scale: jax.Array) -> jax.Array:
        if weights.format == "mxfp4":
            # Two values in a byte, the lower column in the lower half; a scale for 32 columns of a row.
            codes = jnp.stack([matrix & 15, matrix >> 4], axis=-1).reshape(*matrix.shape[:-1], -1)
            magnitudes = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7]
            matrix = jnp.where(codes & 8, -magnitudes, magnitudes)
            scale = jnp.repeat(scale.astype(jnp.float32), 32, axis=-1)
        else:
            scale = jnp.repeat(jnp.repeat(scale, 128, axis=-2), 128, axis=-1)
        return jnp.swapaxes(matrix.astype(jnp.float32) * scale, -1, -2).astype(dtype)

    layers = zip(values(gate_up, gate_up_scale), values(down, down_scale), strict=True)
    return tuple(FloatExperts(*layer) for layer in layers)


def apply_experts(
    experts: LayerExperts,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    layer: jax.Array | int,
    *,
    shared: LayerExperts = None,
    routed_scaling_factor: float = 1.0,
    activation_clamp: float | None = None,
) -> jax.Array:
    """[B, H]: the weighted sum of each token's experts, for x[B, H], ids int32[B, k] and weights f32[B, k].

    Slots with the id -1 are unused, and tokens without used slots are of no request. `experts` are those of all layers
    stacked, or float ones of this layer; so are the S `shared` ones, through which every token goes. Each device has
    all of these.
    """
    is_used = jnp.any(topk_ids >= 0, axis=1, keepdims=True)
    if experts is None:  # Something of the router's results, which are not to be optimised away.
        return x * (jnp.sum(topk_weights, axis=1) + topk_ids[:, 0])[:, None].astype(x.dtype)
    if isinstance(experts, FloatExperts):
        y = _ragged(experts, x, topk_ids, topk_weights * routed_scaling_factor, activation_clamp)
        if shared is None:
            return y
        assert isinstance(shared, FloatExperts), "shared experts are quantised where the others are"
        ids = jnp.where(is_used, jnp.arange(len(shared.down), dtype=jnp.int32), -1)
        return y + _ragged(shared, x, ids, jnp.ones(ids.shape, jnp.float32), activation_clamp)
    assert not isinstance(shared, FloatExperts), "shared experts are quantised where the others are"
    shared_weights = None
    if shared is not None:
        shared_weights = jnp.broadcast_to(is_used, (len(x), shared.num_experts)).astype(jnp.float32)
    y = mm.moe(
        x.astype(jnp.bfloat16),
        experts,
        topk_ids,
        topk_weights,
        layer=layer,
        shared=shared,
        shared_weights=shared_weights,
        routed_scaling_factor=routed_scaling_factor,
        activation_clamp=activation_clamp,
        expert_axis=EXPERT_AXIS,
        token_axes=TOKEN_AXES,
    )
    return y.astype(x.dtype)


def run_layers(
    add_layer: Callable[..., tuple[jax.Array, Any]],
    x: jax.Array,
    cache: Any,
    layers: Any,
    *experts: Experts,
    is_unrolled: bool,
) -> tuple[jax.Array, Any]:
    """Takes x and the cache through equal layers: `add_layer(x, cache, i, layer, *experts)` gives the next x and cache.

    `layers` is a pytree of arrays with a leading L. Quantised experts are never sliced: all layers' are passed on with
    i. What else is different, `is_unrolled` decides, which float experts ask for:
      - a scan is compiled in the time of one layer. It carries the cache, and so updates it in place; but XLA for GPUs
        copies the weights of `layers`, and of the cache what a layer reads, out of the stacks, in every step.
      - unrolled, weights are read where they are. So is a cache of one array for each layer.
    """
    num_layers = len(jax.tree.leaves(layers)[0])
    if not is_unrolled and not any(isinstance(each, tuple) for each in experts):

        def body(carry: tuple[jax.Array, Any], scanned: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
            layer, i = scanned
            return add_layer(*carry, i, layer, *experts), None

        (x, cache), _ = jax.lax.scan(body, (x, cache), (layers, jnp.arange(num_layers, dtype=jnp.int32)))
        return x, cache
    for i in range(num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
        of_layer = [each[i] if isinstance(each, tuple) else each for each in experts]
        x, cache = add_layer(x, cache, i, layer, *of_layer)
    return x, cache


def _ragged(
    experts: FloatExperts, x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array, clamp: float | None
) -> jax.Array:
    """The same in floating point: rows of (token, slot) pairs, sorted by expert, through two ragged products."""
    num_experts, intermediate_size, _ = experts.down.shape
    is_used = topk_ids >= 0
    # Unused slots go behind those of the last expert, where no group reaches.
    flat_ids = jnp.where(is_used, topk_ids, num_experts).reshape(-1)
    order = jnp.argsort(flat_ids)
    group_sizes = jnp.bincount(flat_ids, length=num_experts).astype(jnp.int32)
    rows = x[order // topk_ids.shape[1]]
    gate_up = jax.lax.ragged_dot(rows, experts.gate_up, group_sizes)
    gate, up = gate_up[:, :intermediate_size], gate_up[:, intermediate_size:]
    if clamp is not None:
        gate, up = jnp.minimum(gate, clamp), jnp.clip(up, -clamp, clamp)
    results = jax.lax.ragged_dot(jax.nn.silu(gate) * up, experts.down, group_sizes)
    results = jnp.zeros_like(results).at[order].set(results).reshape(*topk_ids.shape, -1)
    # `where` as well as the weight: rows that no group reaches may hold anything.
    weighted = jnp.where(is_used[..., None], results * topk_weights[..., None], 0)
    return jnp.sum(weighted, axis=1).astype(x.dtype)
