"""Two ranks that part ways, in a process of their own: `python -m gpu.failure_worker SCENARIO`, see test_failures.py.

What a failed group leaves behind is for good, hence the process. In it, what a rank does next depends on a number of its
own, inside one program over both GPUs: both are there while XLA sets the program up, and after that only the kernel waits
for the other rank. Any collective of XLA's behind that point would hang.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from gpu.test_expert_parallel import bits, is_fused, make_mesh, make_problem, moe, place, place_all
from jax_megamoe import peers
from jax_megamoe.primitives import _library

TOKENS = 2  # of each rank
COMMON, MORE = 20, 4  # launches of both ranks in the loop, and then of rank 0 alone

Run = Callable[[Sequence[int]], np.ndarray]


def program(function: Any) -> Callable[..., jax.Array]:
    """`function(own, x, weights, ids, routing)` on each of the ranks, with own[0] for each; its calls are captured."""
    specs = P("expert")
    mapped = jax.shard_map(function, mesh=make_mesh(expert=2), in_specs=specs, out_specs=specs, check_vma=False)
    return jax.jit(mapped, compiler_options={"xla_gpu_graph_min_graph_size": 1})


def count_nans(turns: jax.Array, *arguments: Any) -> jax.Array:
    """In how many of turns[0] launches each number of the result was NaN."""
    none = jnp.zeros(arguments[0].shape, jnp.int32)
    return jax.lax.fori_loop(0, turns[0], lambda _, nans: nans + jnp.isnan(moe(*arguments)[0]), none)


def first_tokens(count: jax.Array, x: Any, weights: Any, ids: Any, routing: Any) -> jax.Array:
    """The result for the first count[0] tokens, one or two; zeros for the others."""

    def call(tokens: int) -> jax.Array:
        y, _ = moe(x[:tokens], weights, ids[:tokens], routing[:tokens])
        return jnp.pad(y, ((0, TOKENS - tokens), (0, 0)))

    return jax.lax.cond(count[0] == 1, lambda: call(1), lambda: call(2))


def replayed_graph(run: Run, wanted: np.ndarray) -> None:
    """Rank 0 goes on with a loop, whose body is a graph, when rank 1 has left it."""
    nans = run([COMMON + MORE, COMMON])
    # The handler, had it run for a launch behind the one that failed, would have raised an error.
    np.testing.assert_array_equal(nans, np.broadcast_to([[MORE], [MORE], [0], [0]], nans.shape))


def other_shape(run: Run, wanted: np.ndarray) -> None:
    """Rank 0 has one token in a launch in which rank 1 has two."""
    for tokens in (1, 2):
        y, rows = run([tokens, tokens]), np.tile(np.arange(TOKENS) < tokens, 2)
        np.testing.assert_array_equal(bits(y[rows]), wanted[rows])
    assert len(_library.symmetric_memories()) == 2, "both shapes were to share one buffer on each GPU"
    failed = np.isnan(run([1, 2]).astype(np.float32))
    np.testing.assert_array_equal(failed, np.broadcast_to([[True], [False], [True], [True]], failed.shape))


SCENARIOS: dict[str, tuple[Any, Callable[[Run, np.ndarray], None]]] = {
    "replayed_graph": (count_nans, replayed_graph),
    "other_shape": (first_tokens, other_shape),
}


def main(scenario: str) -> None:
    """The scenario, and what has to hold after it."""
    function, check = SCENARIOS[scenario]
    mesh, problem = make_mesh(expert=2), make_problem(2 * TOKENS)
    placed, wanted = place_all(mesh, *problem), bits(moe(*problem)[0])
    # Epoch 1. This program keeps the group's memory, and what is written there, until the end.
    assert is_fused(moe, *placed)
    np.testing.assert_array_equal(bits(moe(*placed)[0]), wanted)

    parted = program(function)
    check(lambda own: np.asarray(parted(place(mesh, np.array(own, np.int32), "expert"), *placed)), wanted)
    assert peers.failures()
    time.sleep(2)  # who looks at the notes does so twice a second

    # Another program, since one that has run might be replayed, too.
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"rank \d waited in vain for rank \d, phase routing"):
        jax.block_until_ready(jax.jit(mm.moe)(*placed))
    np.testing.assert_array_equal(bits(moe(*problem)[0]), wanted)


if __name__ == "__main__":
    main(sys.argv[1])
