"""Random weights and inputs, made on the device where they are large."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_megamoe as mm
from bench.presets import ROUTINGS
from bench.shape import Shape
from bench.timing import NUM_CALLS
from jax_megamoe import mxfp4, weight_layout
from jax_megamoe.weight_layout import Format


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


def make_weights(shape: Shape, format: Format = "fp8_block") -> mm.ExpertWeights:
    """Random weights of a format, all finite, none of them made of floats, which would need several times the room."""
    return _make_mxfp4(shape) if format == "mxfp4" else _make_fp8(shape, format)


def _make_fp8(shape: Shape, format: Format) -> mm.ExpertWeights:
    """Random finite E4M3 bytes in the packed layout, and scales of blocks or rows."""
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
    shapes = weight_layout.leaf_shapes(format, e, h, i)
    if format == "fp8_channel":
        gate_up_scale = weight_layout.pack_gate_up_row_scale(scales_of(keys[2], e, 2 * i))
        down_scale = weight_layout.pack_down_row_scale(scales_of(keys[3], e, h))
    else:
        block = weight_layout.BLOCK
        gate_up_scale = weight_layout.pack_gate_up_scale(scales_of(keys[2], e, 2 * i // block, h // block))
        down_scale = weight_layout.pack_down_scale(scales_of(keys[3], e, h // block, i // block))
    return mm.ExpertWeights(
        gate_up=make(keys[0], shapes.gate_up),
        gate_up_scale=gate_up_scale,
        down=make(keys[1], shapes.down),
        down_scale=down_scale,
        num_experts=e,
        hidden_size=h,
        intermediate_size=i,
        layout=weight_layout.LAYOUT_TAGS[format],
    )


def _make_mxfp4(shape: Shape) -> mm.ExpertWeights:
    """Random codes and exponents, each drawn in a program of its own as they take most room, through the packer."""
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
    # Of the largest of the groups: most weights are then about as large as those of `_make_fp8`.
    largest = 127 - round(np.log2(h) / 2)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def codes_of(key: jax.Array, rows: int, columns: int) -> jax.Array:
        return jax.random.bits(key, (e, rows, columns // 2), jnp.uint8)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def exponents_of(key: jax.Array, rows: int, columns: int) -> jax.Array:
        # Different ones in a row, and rows of different scales: one in a wrong place shows in the result.
        of_row, of_group = jax.random.split(key)
        below = jax.random.bits(of_row, (e, rows, 1), jnp.uint8) % 4
        return largest - below - jax.random.bits(of_group, (e, rows, columns // mxfp4.GROUP), jnp.uint8) % 4

    keys = jax.random.split(jax.random.key(0), 4)
    return mm.pack_experts(
        codes_of(keys[0], 2 * i, h),
        exponents_of(keys[2], 2 * i, h),
        codes_of(keys[1], h, i),
        exponents_of(keys[3], h, i),
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
