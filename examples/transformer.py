"""What both decoders have in common: RMS norm, rotary embeddings with YaRN, and cache slots of sequences.

Shapes: B slots, each of one sequence or empty; S positions of the cache.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def rms_norm(x: jax.Array, gain: jax.Array, epsilon: float) -> jax.Array:
    """x[..., H] normalised in FP32, as models do whatever their type is."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return gain * wide.astype(x.dtype)


def rotary_frequencies(config: Mapping[str, Any], size: int) -> tuple[np.ndarray[Any, Any], float]:
    """Angles per position f32[size / 2], and what multiplies the rotated vectors; YaRN where the configuration asks.

    YaRN: dimensions that turn more than `beta_fast` times in the original context keep their frequency, those that turn
    less than `beta_slow` times are slowed down by `factor`, and those between are blended.
    """
    rope = rope_parameters(config)
    base = float(rope["rope_theta"])
    frequencies = base ** (-np.arange(0, size, 2) / size)
    if rope["rope_type"] == "default":
        return frequencies.astype(np.float32), 1.0
    if rope["rope_type"] != "yarn":
        raise ValueError(f"rope_type is {rope['rope_type']!r}, wanted 'default' or 'yarn': this example has no other.")
    factor, context = float(rope["factor"]), rope["original_max_position_embeddings"]

    def dimension_that_turns(times: float) -> float:
        return size * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_that_turns(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension_that_turns(rope.get("beta_slow") or 1)), size - 1)
    slowed = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
    frequencies = frequencies * (1 - slowed) + frequencies / factor * slowed
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    scale = yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all) if mscale and mscale_all else yarn_scale(factor)
    return frequencies.astype(np.float32), scale


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_type` and what goes with it: configurations have them in one of two ways."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return rope


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """How much larger YaRN makes scores, for a context that is `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def angles(positions: jax.Array, frequencies: np.ndarray[Any, Any], scale: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine f32[B, 1, size / 2] for positions int32[B], the 1 for heads."""
    turns = positions[:, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(turns) * scale, jnp.sin(turns) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """x[B, heads, size] turned pair by pair: (i, i + size / 2), or neighbours where `interleaved`.

    The result has all first partners in front either way. Scores do not see the order, as queries and keys share it.
    """
    wide = x.astype(jnp.float32)
    half = x.shape[-1] // 2
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def visible_positions(positions: jax.Array, length: int) -> jax.Array:
    """bool[B, S]: up to a slot's own position. Empty slots, at -1, see the first one: no softmax is of nothing."""
    return jnp.arange(length) <= jnp.maximum(positions, 0)[:, None]


# What all layers have of a cache: stacked, [L, B, ..., S, D], or an array [B, ..., S, D] for each.
CacheLeaf = jax.Array | tuple[jax.Array, ...]


def empty_leaf(num_layers: int, shape: tuple[int, ...], dtype: Any, is_stacked: bool) -> CacheLeaf:
    """Zeros, of shape [B, ..., S, D] in each layer."""
    if is_stacked:
        return jnp.zeros((num_layers, *shape), dtype)
    return tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))


def write_cache(cache: CacheLeaf, layer: int | jax.Array, positions: jax.Array, values: jax.Array) -> CacheLeaf:
    """Writes values [B, ..., D] to a layer of the cache at each slot's position; those of empty slots are dropped.

    One scatter into a buffer that the caller donates: nothing else of the cache moves.
    """
    if isinstance(cache, tuple):
        return _with_array(cache, layer, write_cache(cache[layer][None], 0, positions, values)[0])
    slots = jnp.arange(len(values))
    # -1 is no place, and not the last one.
    at = cache.at[layer, slots, ..., positions, :]
    return at.set(values.astype(cache.dtype), mode="drop", wrap_negative_indices=False)


def layer_of_cache[Tree](cache: Tree, layer: int | jax.Array) -> Tree:
    """What one layer has of a pytree of `CacheLeaf`."""
    return jax.tree.map(lambda leaf: leaf[layer], cache, is_leaf=_is_leaf)


def with_layer_of_cache[Tree](cache: Tree, layer: int | jax.Array, of_layer: Tree) -> Tree:
    """The same cache with other arrays of that layer."""
    return jax.tree.map(lambda leaf, array: _with_array(leaf, layer, array), cache, of_layer, is_leaf=_is_leaf)


def _with_array(leaf: CacheLeaf, layer: int | jax.Array, array: jax.Array) -> CacheLeaf:
    if isinstance(leaf, tuple):
        assert isinstance(layer, int), "layers in a scan have a stacked cache"
        return (*leaf[:layer], array, *leaf[layer + 1 :])
    return leaf.at[layer].set(array)


def _is_leaf(value: Any) -> bool:
    return type(value) is tuple  # which a NamedTuple is not


def masked_softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax f32 over the last dimension of scores, where `visible`."""
    return jax.nn.softmax(jnp.where(visible, scores.astype(jnp.float32), -jnp.inf), axis=-1)
