"""Random weights and inputs, made on the device where they are large."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_megamoe as mm
from bench.presets import Shape

NUM_INPUTS = 12


class Inputs(NamedTuple):
    """Different tokens for each of the calls of one program."""

    x: list[jax.Array]
    topk_ids: list[jax.Array]
    topk_weights: list[jax.Array]

    def touched(self, num_experts: int) -> float:
        """Distinct experts of a call, on average."""
        counts = [len({int(i) for i in np.ravel(ids) if 0 <= i < num_experts}) for ids in self.topk_ids]
        return float(np.mean(counts))


def make_weights(shape: Shape) -> mm.ExpertWeights:
    """Random finite E4M3 bytes in the packed layout; a step through the packer would need host memory of this size."""
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts

    def bytes_of(key: jax.Array, dims: tuple[int, ...]) -> jax.Array:
        bits = jax.random.bits(key, dims, jnp.uint8)
        magnitude = 0x28 + (bits & 0x7F) % 0x38  # 2^-2 to 2^5
        return jax.lax.bitcast_convert_type((bits & 0x80 | magnitude).astype(jnp.uint8), jnp.float8_e4m3fn)

    make = jax.jit(bytes_of, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), 2)
    scale = np.float32(0.1 / np.sqrt(h))
    return mm.ExpertWeights(
        gate_up=make(keys[0], (e, i // 64, h // 128, 16384)),
        gate_up_scale=jnp.full((e, i // 64, h // 128, 4), scale),
        down=make(keys[1], (e, h // 64, i // 128, 8192)),
        down_scale=jnp.full((e, h // 64, -(-i // 256), 4), scale),
        num_experts=e,
        hidden_size=h,
        intermediate_size=i,
    )


def make_inputs(shape: Shape, num_tokens: int, routing: str, seed: int) -> Inputs:
    """`routing`: uniform (no repeats in a token), zipf, hot (half of all slots on one expert) or masked30."""
    random = np.random.default_rng(seed)
    inputs = Inputs([], [], [])
    for _ in range(NUM_INPUTS):
        size = (num_tokens, shape.num_experts)
        popularity = np.zeros(shape.num_experts)
        if routing == "zipf":
            popularity = -np.log(np.arange(1, shape.num_experts + 1))
        # The k largest of log-weights plus Gumbel noise: a draw without repeats.
        ids = np.argsort(-(popularity + random.gumbel(size=size)), axis=1)[:, : shape.top_k].astype(np.int32)
        if routing == "hot":
            ids[:, : shape.top_k // 2] = 0
        if routing == "masked30":
            ids[random.random(ids.shape) < 0.3] = -1
        inputs.x.append(jnp.asarray(random.standard_normal((num_tokens, shape.hidden_size)), jnp.bfloat16))
        inputs.topk_ids.append(jnp.asarray(ids))
        inputs.topk_weights.append(jnp.asarray(random.random(ids.shape), jnp.float32))
    return inputs
