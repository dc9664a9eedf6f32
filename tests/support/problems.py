"""Weights and inputs of any size, for tests on a Hopper GPU."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_megamoe as mm
from jax_megamoe.weight_layout import Format


class Sizes(NamedTuple):
    """Of an expert layer."""

    hidden: int
    inter: int
    num_experts: int
    top_k: int


class Problem(NamedTuple):
    """Arguments of `mm.moe`."""

    x: Any
    weights: mm.ExpertWeights
    ids: Any
    topk_weights: Any


@functools.cache
def make_weights(sizes: Sizes, seed: int = 0, weight_format: Format = "fp8_block") -> mm.ExpertWeights:
    """Biases wherever the format has them, so that all tests of it are of them too; zeros behind odd sizes."""
    num_experts, hidden, inter = sizes.num_experts, sizes.hidden, sizes.inter
    keys = jax.random.split(jax.random.key(seed), 5)
    # Blocks of different sizes, so that a scale that is mixed up shows.
    factors = jnp.repeat(jnp.linspace(0.02, 0.08, num_experts), 1)[:, None, None]
    gate, up = (jax.random.normal(key, (num_experts, inter, hidden), jnp.bfloat16) * factors for key in keys[:2])
    rows = jnp.linspace(0.5, 2.0, inter)[None, :, None]
    down = jax.random.normal(keys[2], (num_experts, hidden, inter), jnp.bfloat16) * factors
    gate, up, down = ((gate * rows).astype(jnp.bfloat16), up.astype(jnp.bfloat16), down.astype(jnp.bfloat16))
    if weight_format == "fp8_block":
        return mm.quantize_experts(gate, up, down, format=weight_format, pad=True)
    # Of the size of the sums that they are added to.
    gate_up_bias = jax.random.normal(keys[3], (num_experts, 2 * inter), jnp.bfloat16)
    down_bias = jax.random.normal(keys[4], (num_experts, hidden), jnp.bfloat16)
    return mm.quantize_experts(
        gate, up, down, gate_up_bias=gate_up_bias, down_bias=down_bias, format=weight_format, pad=True
    )


def make_inputs(tokens: int, sizes: Sizes, routing: str = "uniform", seed: int = 0) -> tuple[jax.Array, ...]:
    """x, ids and topk_weights; how ids are spread over the experts is `routing`. Weights of unused slots are NaN."""
    random, num_experts = np.random.default_rng(seed), sizes.num_experts
    ids = random.integers(0, num_experts, (tokens, sizes.top_k)).astype(np.int32)  # repeats included
    topk_weights = random.random(ids.shape).astype(np.float32) + 0.05
    if routing == "one":
        ids[:] = num_experts // 2
    if routing == "masked":
        ids[random.random(ids.shape) < 0.3] = -1
        ids[random.random(ids.shape) < 0.05] = num_experts + 5
        ids[random.random(ids.shape) < 0.05] = -(2**31)
    if routing == "none":
        ids[:] = -1
    topk_weights[(ids < 0) | (ids >= num_experts)] = np.nan
    x = jnp.asarray(random.standard_normal((tokens, sizes.hidden)), jnp.bfloat16)
    return x, jnp.asarray(ids), jnp.asarray(topk_weights)


def make_problem(
    tokens: int,
    sizes: Sizes,
    routing: str = "uniform",
    seed: int = 0,
    weights_seed: int = 0,
    weight_format: Format = "fp8_block",
) -> Problem:
    x, ids, topk_weights = make_inputs(tokens, sizes, routing, seed)
    return Problem(x, make_weights(sizes, weights_seed, weight_format), ids, topk_weights)
