"""A group of one GPU: communicator, shared memory and protocol as among many, with nobody on the other end."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.primitives import _library
from jax_megamoe.primitives.moe_peers import moe_peers, setup_timeout_from_environment, timeout_from_environment
from tests.support.cases import SHARED
from tests.support.compare import bits
from tests.support.meshes import mesh_of
from tests.support.problems import make_problem
from tests.support.skips import gpu_tests, gpus, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())

alone: Any = jax.jit(functools.partial(mm.moe, return_expert_load=True))


def make_program(num_calls: int) -> Any:
    """So many calls, one after the other."""
    mesh = mesh_of(gpus(), {"expert": 1})

    def calls(x, weights, ids, topk_weights, layer):
        leaves = (weights.gate_up, weights.gate_up_scale, weights.down, weights.down_scale)
        results = []
        for _ in range(num_calls):
            y, load = moe_peers(
                x,
                *leaves,
                ids,
                topk_weights,
                layer,
                axis_sizes={"expert": 1},
                expert_axes=("expert",),
                gathered_axes=("expert",),
                timeout_microseconds=timeout_from_environment(),
                setup_timeout_microseconds=setup_timeout_from_environment(),
            )
            x, y = jax.lax.optimization_barrier((x, y))
            results.append((y, load))
        return results

    return jax.jit(jax.shard_map(calls, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))


@pytest.mark.parametrize("tokens", [1, 40, 128, 300])
def test_same_as_without_a_group(tokens):
    problem = make_problem(tokens, SHARED, "masked")
    wanted, wanted_load = alone(*problem)
    program = make_program(12)
    for _ in range(20):
        for y, load in program(*problem, np.int32(0)):
            np.testing.assert_array_equal(load, wanted_load)
            np.testing.assert_array_equal(bits(y), bits(wanted))


def test_memory_goes_with_the_programs():
    problem = make_problem(8, SHARED)
    jax.clear_caches()
    before = len(_library.symmetric_memories())
    program = make_program(2)
    jax.block_until_ready(program(*problem, np.int32(0)))
    held = _library.symmetric_memories()
    assert len(held) == before + 1 and held[-1]["num_ranks"] == 1  # one for both calls
    del program
    jax.clear_caches()
    assert len(_library.symmetric_memories()) == before
