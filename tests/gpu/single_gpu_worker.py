"""Faults that a process with one GPU meets alone: `python -m tests.gpu.single_gpu_worker SCENARIO`, see test_single_gpu_faults.py."""

import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_megamoe as mm
from tests.support.cases import SHARED
from tests.support.chain import CAPTURED, NOT_CAPTURED
from tests.support.compare import difference, judge
from tests.support.problems import Problem, make_problem
from tests.support.processes import join, leave, say, signal_after

FEW, MANY = 64, 32768  # tokens; the second's scratch is some 250 MB
KILLED_AFTER = 2.0  # seconds


def compile_layer(problem: Problem, captured: bool) -> Any:
    options = CAPTURED if captured else NOT_CAPTURED
    return jax.jit(mm.moe, compiler_options=options).lower(*problem).compile()


def tell(call: str, program: Any, problem: Problem, wanted: Any) -> None:
    """One line for a call: `right`, or its error."""
    begun = time.monotonic()
    try:
        outcome, error = judge(jax.block_until_ready(program(*problem)), wanted), None
    except Exception as raised:
        outcome, error = None, f"{type(raised).__name__}: {raised}"
    say(call=call, outcome=outcome, error=error, seconds=round(time.monotonic() - begun, 3))


def no_scratch(captured: bool) -> None:
    """JAX's pool has no room for a call's scratch; then it has."""
    device = jax.devices()[0]
    few, many = make_problem(FEW, SHARED), make_problem(MANY, SHARED)
    small, large = compile_layer(few, captured), compile_layer(many, captured)
    wanted_small, wanted_large = np.asarray(small(*few)), np.asarray(large(*many))
    scratch = large.memory_analysis().temp_size_in_bytes
    say(scratch=scratch)
    stats = device.memory_stats()
    piece = 1 << 20
    # Pieces, since what is free need not be in one; half of the scratch is left.
    pieces = max(0, stats["bytes_limit"] - stats["bytes_in_use"] - scratch // 2) // piece
    ballast = [jnp.zeros(piece, jnp.uint8, device=device) for _ in range(pieces)]
    jax.block_until_ready(ballast)
    tell("large", large, many, wanted_large)
    tell("large again", large, many, wanted_large)
    tell("small", small, few, wanted_small)
    del ballast
    tell("freed", large, many, wanted_large)
    tell("small after", small, few, wanted_small)


def killed(captured: bool) -> None:
    """In the middle of a program of launches without end, most likely in one of them."""
    problem = make_problem(FEW, SHARED)

    def launches(most: Any, x: Any, *others: Any) -> jax.Array:
        return jax.lax.fori_loop(0, most, lambda _, y: mm.moe(jnp.where(y > 0, x, -x), *others), x)

    options = CAPTURED if captured else NOT_CAPTURED
    program = jax.jit(launches, compiler_options=options)
    jax.block_until_ready(program(jnp.int32(3), *problem))
    say(call="before", outcome="right", error=None, seconds=0)
    signal_after(KILLED_AFTER, signal.SIGKILL)
    jax.block_until_ready(program(jnp.int32(np.iinfo(np.int32).max), *problem))
    say(call="parted", outcome="came to an end", error=None, seconds=0)


def works(captured: bool) -> None:
    """Nothing happens."""
    problem = make_problem(FEW, SHARED)
    program = compile_layer(problem, captured)
    wanted = np.asarray(mm.reference.moe(*problem))
    for call in ("first", "again"):
        begun = time.monotonic()
        y = np.asarray(program(*problem))
        say(call=call, difference=difference(y, wanted), seconds=round(time.monotonic() - begun, 3))


SCENARIOS: dict[str, Callable[[bool], None]] = {scenario.__name__: scenario for scenario in (no_scratch, killed, works)}


def main(scenario: str, captured: str = "captured") -> None:
    place = join()
    SCENARIOS[scenario](captured == "captured")
    leave(place)


if __name__ == "__main__":
    main(*sys.argv[1:])
