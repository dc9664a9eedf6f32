"""Checkpoints of experts whose sizes are no multiples of 128: every encoding, and what becomes of it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.errors import CheckpointError
from tests.support.checkpoints import (
    Encode,
    H,
    assert_same,
    build,
    fp8_block,
    fp8_channel,
    fp8_matrix,
    fp8_small_blocks,
    mxfp4,
    octets,
    write,
)
from tests.support.compare import difference
from tests.support.families import PLANS

# Hidden and intermediate sizes; blocks of 32 columns, and of 32x32, are whole.
OTHER_SIZES: dict[str, tuple[Encode, int, int]] = {
    "blocks": (fp8_block(), 200, 72),
    "few blocks": (fp8_block("E8M0"), 96, 160),
    "rows": (fp8_channel(), 200, 72),
    "matrices": (fp8_matrix(), 72, 200),
    "mxfp4": (mxfp4(), 224, 160),
    "one group of mxfp4": (mxfp4(), 32, 64),
    "one group of mxfp4 in down": (mxfp4(), 64, 32),
    "one block": (fp8_block("uint8"), 96, 96),
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_sizes_that_are_no_multiples_of_128(name, tmp_path):
    encode, hidden_size, intermediate_size = OTHER_SIZES[name]
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "model_size": hidden_size,
        "intermediate_size": intermediate_size,
    }
    stock = build(dataclasses.replace(PLANS["qwen3-fp8"], encode=encode, **sizes))
    weights = mm.load_experts(write(tmp_path, stock.config, stock.tensors), 2)
    assert (weights.hidden_size, weights.intermediate_size) == (hidden_size, intermediate_size)
    assert_same(weights, stock.natural(2))


@pytest.mark.parametrize("name, format", [
    ("qwen3-bf16", "fp8_block"), ("qwen3.5-transposed", "fp8_block"), ("qwen3-bf16", "fp8_channel"),
    ("qwen3.5-bf16", "mxfp4"),
])  # fmt: skip
def test_floats_of_sizes_that_are_no_multiples_of_128(name, format, tmp_path):
    sizes: dict[str, Any] = {"hidden_size": 224, "model_size": 224, "intermediate_size": 96}
    stock = build(dataclasses.replace(PLANS[name], **sizes))
    weights = mm.load_experts(write(tmp_path, stock.config, stock.tensors), 1, format=format)
    gate, up, down = (np.stack([one[part].tensors[".weight"] for one in stock.experts[1]]) for part in range(3))
    wanted = mm.quantize_experts(gate, up, down, format=format, pad=True)
    for found, leaf in zip(weights.leaves, wanted.leaves, strict=True):
        np.testing.assert_array_equal(octets(found), octets(leaf))


def test_sizes_that_groups_of_32_do_not_divide(tmp_path):
    stock = build(dataclasses.replace(PLANS["qwen3-bf16"], intermediate_size=72))
    checkpoint = mm.read_checkpoint(write(tmp_path, stock.config, stock.tensors))
    assert checkpoint.experts(1).intermediate_size == 72
    with pytest.raises(CheckpointError, match="the intermediate size is 72, wanted a multiple of 32 for mxfp4"):
        checkpoint.experts(1, format="mxfp4")


@pytest.mark.parametrize("encode, count", [(fp8_block(), 1), (mxfp4(), 2), (fp8_channel(), 2), (fp8_small_blocks, 2)])
def test_shared_experts_are_put_apart_where_scales_are(encode, count, tmp_path):
    """Two of 96 in one network of 192: blocks of 128 rows would belong to both."""
    stock = build(dataclasses.replace(PLANS["deepseek-v3"], encode=encode, num_shared=2, intermediate_size=96))
    shared = mm.read_checkpoint(write(tmp_path, stock.config, stock.tensors)).shared_experts(1)
    assert shared is not None and (shared.num_experts, shared.intermediate_size) == (count, 192 // count)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, H)), jnp.bfloat16)
    ids = jnp.tile(jnp.arange(count), (4, 1))
    found = mm.moe(x, shared, ids, jnp.ones(ids.shape))
    gate, up, down = (stored.values for stored in stock.shared[1])
    g, u = np.asarray(x, np.float64) @ gate.T, np.asarray(x, np.float64) @ up.T
    assert difference(found, (g / (1 + np.exp(-g)) * u) @ down.T) < 3e-3


@pytest.mark.parametrize("encode, count", [(fp8_block(), 1), (fp8_channel(), 2)])
def test_a_gate_has_a_row_for_each_shared_expert(encode, count, tmp_path):
    """Also where blocks keep what is as wide as two of them in one."""
    plan = PLANS["qwen3.6-fp8"]
    config = {**plan.config, "shared_expert_intermediate_size": 192}
    stock = build(dataclasses.replace(plan, config=config, encode=encode, num_shared=2, intermediate_size=96))
    checkpoint = mm.read_checkpoint(write(tmp_path, stock.config, stock.tensors))
    shared, gate = checkpoint.shared_experts(1), checkpoint.router(1).shared_gate
    assert shared is not None and gate is not None and shared.num_experts == len(gate) == count
    np.testing.assert_array_equal(gate, np.repeat(stock.router[1]["shared_gate"], count, axis=0))


def test_mxfp4_becomes_fp8_blocks_exactly(tmp_path):
    plan = dataclasses.replace(PLANS["mimo-v2.6"], hidden_size=224, model_size=224, intermediate_size=96)
    stock = build(plan)
    weights = mm.load_experts(write(tmp_path, stock.config, stock.tensors), 1, format="fp8_block")
    gate_up, gate_up_scale, down, down_scale = map(np.asarray, weights.unpack())
    gate, up, wanted_down = stock.values(1)
    halves = zip(np.split(gate_up, 2, axis=1), np.split(gate_up_scale, 2, axis=1), (gate, up), strict=True)
    for values, scale, wanted in (*halves, (down, down_scale, wanted_down)):
        _, rows, columns = wanted.shape
        wide = scale.astype(np.float64).repeat(128, 1)[:, :rows].repeat(128, 2)[:, :, :columns]
        np.testing.assert_array_equal(values.astype(np.float64) * wide, wanted)
