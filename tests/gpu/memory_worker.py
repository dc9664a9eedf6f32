"""Whether memory stays flat: `python -m tests.gpu.memory_worker calls|sizes|programs|groups`.

Says what is in use, on the host and on each GPU, after a warm-up and at times from then on: MiB that the driver has
given to anybody, bytes that live in XLA's allocator, KiB of this process, and its live arrays.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_megamoe as mm
from jax_megamoe.primitives import _library
from tests.support.compare import bits
from tests.support.gpu_memory import used_mib
from tests.support.meshes import mesh_of, place_all
from tests.support.problems import Sizes, make_inputs, make_weights
from tests.support.processes import join, leave, say

SIZES = Sizes(hidden=512, inter=384, num_experts=8, top_k=4)
# Tried without GPUs, everything is done this many times less often.
SCALE = int(os.environ.get("MEGAMOE_MEMORY_SCALE", "1"))
CALLS, NUM_SIZES, PROGRAMS, GROUPS = 10_000 // SCALE, 100 // SCALE, 20 // SCALE, 5
LOOKS = 5  # at the memory, from the warm-up to the end


def resident_kib() -> int:
    """Of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1])


def state() -> dict[str, Any]:
    gc.collect()
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    return {
        "used": used_mib(),
        "in_use": [int(found.get("bytes_in_use", 0)) for found in statistics],
        "resident": resident_kib(),
        "arrays": len(jax.live_arrays()),
        "shared": sum(memory["bytes"] for memory in _library.symmetric_memories()),
    }


def fresh() -> Any:
    """A program that no other call shares."""
    return jax.jit(lambda *operands: mm.moe(*operands))


def calls() -> Iterator[None]:
    """One program, ten thousand times."""
    x, ids, topk_weights = make_inputs(64, SIZES)
    program, weights = fresh(), make_weights(SIZES)
    wanted = bits(program(x, weights, ids, topk_weights))
    for number in range(CALLS):
        y = program(x, weights, ids, topk_weights)
        if number % 1000 == 0:
            np.testing.assert_array_equal(bits(y), wanted)
        yield


def sizes() -> Iterator[None]:
    """A hundred sizes of batch, again and again: a program for each, which stays."""
    program, weights = fresh(), make_weights(SIZES)
    inputs = [make_inputs(tokens, SIZES) for tokens in range(1, 4 * NUM_SIZES + 1, 4)]
    for x, ids, topk_weights in inputs:
        program(x, weights, ids, topk_weights).block_until_ready()
    for _ in range(LOOKS * 10):
        for x, ids, topk_weights in inputs:
            program(x, weights, ids, topk_weights)
        yield


def programs() -> Iterator[None]:
    """Programs that are made and dropped."""
    x, ids, topk_weights = make_inputs(64, SIZES)
    weights = make_weights(SIZES)
    for _ in range(PROGRAMS):
        fresh()(x, weights, ids, topk_weights).block_until_ready()
        jax.clear_caches()
        yield


def groups() -> Iterator[None]:
    """Groups that are made and dropped: the last program of one takes its memory along."""
    devices = jax.devices()
    ranks = 1 << (len(devices).bit_length() - 1)
    sizes_of_all = SIZES._replace(num_experts=SIZES.num_experts * ranks)
    problem = (*make_inputs(64 * ranks, sizes_of_all)[:1], make_weights(sizes_of_all))
    problem += make_inputs(64 * ranks, sizes_of_all)[1:]
    mesh = mesh_of(devices, {"expert": ranks})
    for _ in range(GROUPS + 1):  # the first is the warm-up
        arguments = place_all(mesh, problem)
        jax.block_until_ready(fresh()(*arguments))
        say(group=[memory["bytes"] for memory in _library.symmetric_memories()])
        del arguments
        jax.clear_caches()
        yield


# What is done, and how often until the first look.
KINDS: dict[str, tuple[Callable[[], Iterator[None]], int]] = {
    "calls": (calls, CALLS // 10),
    "sizes": (sizes, LOOKS),
    "programs": (programs, max(1, PROGRAMS // 5)),
    "groups": (groups, 1),
}


def main(kind: str) -> None:
    place = join()
    function, warm_up = KINDS[kind]
    jnp.zeros(1).block_until_ready()
    total = {"calls": CALLS, "sizes": LOOKS * 10, "programs": PROGRAMS, "groups": GROUPS + 1}[kind]
    looks = sorted({*np.linspace(warm_up, total, LOOKS).astype(int).tolist(), total})
    for done, _ in enumerate(function(), 1):
        if done in looks:
            say(done=done, **state())
    leave(place)


if __name__ == "__main__":
    main(*sys.argv[1:])
