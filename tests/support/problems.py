"""Weights and inputs for tests on a Hopper GPU, and how far results are apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_megamoe as mm


@functools.cache
def make_weights(num_experts: int, hidden: int, inter: int, seed: int = 0) -> mm.ExpertWeights:
    keys = jax.random.split(jax.random.key(seed), 3)
    # Blocks of different sizes, so that a scale that is mixed up shows.
    sizes = jnp.repeat(jnp.linspace(0.02, 0.08, num_experts), 1)[:, None, None]
    gate, up = (jax.random.normal(key, (num_experts, inter, hidden), jnp.bfloat16) * sizes for key in keys[:2])
    rows = jnp.linspace(0.5, 2.0, inter)[None, :, None]
    down = jax.random.normal(keys[2], (num_experts, hidden, inter), jnp.bfloat16) * sizes
    return mm.quantize_experts((gate * rows).astype(jnp.bfloat16), up.astype(jnp.bfloat16), down.astype(jnp.bfloat16))


def make_inputs(tokens: int, hidden: int, num_experts: int, top_k: int, routing: str = "uniform", seed: int = 0):
    random = np.random.default_rng(seed)
    ids = random.integers(0, num_experts, (tokens, top_k)).astype(np.int32)  # repeats included
    weights = random.random((tokens, top_k)).astype(np.float32) + 0.05
    if routing == "one":
        ids[:] = num_experts // 2
    if routing == "masked":
        ids[random.random(ids.shape) < 0.3] = -1
        ids[random.random(ids.shape) < 0.05] = num_experts + 5
        ids[random.random(ids.shape) < 0.05] = -(2**31)
    if routing == "none":
        ids[:] = -1
    weights[(ids < 0) | (ids >= num_experts)] = np.nan
    return jnp.asarray(random.standard_normal((tokens, hidden)), jnp.bfloat16), jnp.asarray(ids), jnp.asarray(weights)


def difference(a, b) -> float:
    left, right = (np.asarray(v, np.float64).ravel() for v in (a, b))
    norm = left @ left + right @ right
    return float(1 - 2 * (left @ right) / norm) if norm else 0.0
