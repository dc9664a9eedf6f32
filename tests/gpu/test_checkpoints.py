"""Checkpoints onto a GPU: the bits that a CPU gets, and each expert written into the result in place."""

import jax
import numpy as np
import pytest

import jax_megamoe as mm
from tests.support.checkpoints import build, large_checkpoint, memory_of_put, octets, write
from tests.support.families import PLANS
from tests.support.skips import gpu_tests, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "deepseek-v4", "glm-4.5", "hy3-fp8", "qwen3-bf16", "qwen3.5-transposed"]
)
def test_a_gpu_gets_the_bits_of_a_cpu(name, tmp_path):
    stock = build(PLANS[name])
    folder = write(tmp_path, stock.config, stock.tensors)
    found = mm.load_experts(folder)
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = mm.load_experts(folder)
    assert next(iter(found.leaves.down.devices())).platform != "cpu"
    for one, other in zip(found.leaves, wanted.leaves, strict=True):
        np.testing.assert_array_equal(octets(one), octets(other))


def test_mxfp4_becomes_the_same_fp8(tmp_path):
    stock = build(PLANS["deepseek-v4"])
    folder = write(tmp_path, stock.config, stock.tensors)
    found = mm.load_experts(folder, 1, format="fp8_block")
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = mm.load_experts(folder, 1, format="fp8_block")
    for one, other in zip(found.leaves, wanted.leaves, strict=True):
        np.testing.assert_array_equal(octets(one), octets(other))


@pytest.mark.parametrize("kind", ["fp8_block", "mxfp4", "floats"])
def test_experts_are_written_into_the_result_in_place(kind, tmp_path, monkeypatch):
    result, memory = memory_of_put(large_checkpoint(tmp_path, kind), monkeypatch)
    assert memory.alias_size_in_bytes >= result
    assert memory.temp_size_in_bytes <= result // 10
