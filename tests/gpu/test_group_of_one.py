"""A group of one GPU: communicator, shared memory and protocol as among many, with nobody on the other end."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from gpu.inputs import make_inputs, make_weights
from gpu.needs import needs_hopper
from jax_megamoe.primitives import _library
from jax_megamoe.primitives.moe_peers import moe_peers, setup_timeout_from_environment, timeout_from_environment

pytestmark = needs_hopper

alone: Any = jax.jit(functools.partial(mm.moe, return_expert_load=True))


def make_program(num_calls: int) -> Any:
    """So many calls, one after the other."""
    mesh = Mesh(np.array(jax.devices("gpu")[:1]), ("expert",))

    def calls(x, weights, ids, routing, layer):
        leaves = (weights.gate_up, weights.gate_up_scale, weights.down, weights.down_scale)
        results = []
        for _ in range(num_calls):
            y, load = moe_peers(
                x,
                *leaves,
                ids,
                routing,
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
    weights = make_weights(16, 512, 384)
    x, ids, probs = make_inputs(tokens, 512, 16, 4, "masked")
    wanted, wanted_load = alone(x, weights, ids, probs)
    program = make_program(12)
    for _ in range(20):
        for y, load in program(x, weights, ids, probs, np.int32(0)):
            np.testing.assert_array_equal(load, wanted_load)
            np.testing.assert_array_equal(np.asarray(y).view(np.uint16), np.asarray(wanted).view(np.uint16))


def test_memory_goes_with_the_programs():
    weights = make_weights(16, 512, 384)
    x, ids, probs = make_inputs(8, 512, 16, 4)
    jax.clear_caches()
    before = len(_library.symmetric_memories())
    program = make_program(2)
    jax.block_until_ready(program(x, weights, ids, probs, np.int32(0)))
    held = _library.symmetric_memories()
    assert len(held) == before + 1 and held[-1]["num_ranks"] == 1  # one for both calls
    del program
    jax.clear_caches()
    assert len(_library.symmetric_memories()) == before
