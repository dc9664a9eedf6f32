"""Random weights and inputs, made on the device where they are large."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_megamoe as mm
from bench.presets import ROUTINGS, Shape
from bench.timing import NUM_CALLS
from jax_megamoe import weight_layout


class Inputs(NamedTuple):
    """Different tokens for each of the calls of one program."""

    x: list[jax.Array]
    topk_ids: list[jax.Array]
    topk_weights: list[jax.Array]

    def touched(self, num_experts: int) -> float:
        """Distinct experts of a call, on average."""
        counts = [len({int(i) for i in np.ravel(ids) if 0 <= i < num_experts}) for ids in self.topk_ids]
        return float(np.mean(counts))

    def pairs(self, num_experts: int) -> float:
        """Used slots of a call, on average."""
        used = [(np.asarray(ids) >= 0) & (np.asarray(ids) < num_experts) for ids in self.topk_ids]
        return float(np.mean([u.sum() for u in used]))


def make_weights(shape: Shape) -> mm.ExpertWeights:
    """Random finite E4M3 bytes in the packed layout; a step through the packer would need host memory of this size."""
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts

    def bytes_of(key: jax.Array, dims: tuple[int, ...]) -> jax.Array:
        bits = jax.random.bits(key, dims, jnp.uint8)
        magnitude = 0x28 + (bits & 0x7F) % 0x38  # 2^-2 to 2^5
        return jax.lax.bitcast_convert_type((bits & 0x80 | magnitude).astype(jnp.uint8), jnp.float8_e4m3fn)

    def scales_of(key: jax.Array, *dims: int) -> jax.Array:
        # All different, so that a scale in a wrong place shows in the result.
        return jax.random.uniform(key, dims, jnp.float32, 0.05, 0.15) / np.float32(np.sqrt(h))

    make = jax.jit(bytes_of, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = weight_layout.leaf_shapes("fp8_block", e, h, i)
    block = weight_layout.BLOCK
    return mm.ExpertWeights(
        gate_up=make(keys[0], shapes.gate_up),
        gate_up_scale=weight_layout.pack_gate_up_scale(scales_of(keys[2], e, 2 * i // block, h // block)),
        down=make(keys[1], shapes.down),
        down_scale=weight_layout.pack_down_scale(scales_of(keys[3], e, h // block, i // block)),
        num_experts=e,
        hidden_size=h,
        intermediate_size=i,
    )


def make_float_weights(shape: Shape) -> tuple[jax.Array, jax.Array]:
    """Random bf16 weights for what has no FP8: gate and up joined, [E, H, 2I], and down, [E, I, H]."""
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
    keys = jax.random.split(jax.random.key(1), 2)
    return (
        jax.random.normal(keys[0], (e, h, 2 * i), jnp.bfloat16),
        jax.random.normal(keys[1], (e, i, h), jnp.bfloat16),
    )


def make_inputs(shape: Shape, num_tokens: int, routing: str, seed: int, num_calls: int = NUM_CALLS) -> Inputs:
    """Inputs for each call of a program, their ids drawn as `presets.ROUTINGS` says."""
    if routing not in ROUTINGS:
        raise ValueError(f"routing is {routing!r}, wanted one of {', '.join(ROUTINGS)}")
    random = np.random.default_rng(seed)
    inputs = Inputs([], [], [])
    for _ in range(num_calls):
        size = (num_tokens, shape.num_experts)
        popularity = np.zeros(shape.num_experts)
        if routing == "zipf":
            popularity = -np.log(np.arange(1, shape.num_experts + 1))
        if routing == "hot":
            popularity[0] = np.inf
        # The k largest of log-weights plus Gumbel noise: a draw without repeats.
        ids = np.argsort(-(popularity + random.gumbel(size=size)), axis=1)[:, : shape.top_k].astype(np.int32)
        if routing == "masked30":
            ids[random.random(ids.shape) < 0.3] = -1
        # On the device: a host takes minutes for thousands of tokens.
        key = jax.random.key(int(random.integers(2**31)))
        inputs.x.append(jax.random.normal(key, (num_tokens, shape.hidden_size), jnp.bfloat16))
        inputs.topk_ids.append(jnp.asarray(ids))
        inputs.topk_weights.append(jnp.asarray(random.random(ids.shape), jnp.float32))
    return inputs
