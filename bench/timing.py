"""How long one call of a program takes, whichever framework runs it. Imports neither JAX nor torch."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

NUM_CALLS = 12  # calls in one program, each with inputs of its own
RUN_SECONDS = 0.03
NUM_RUNS = 7
MAX_REPEATS = 200  # programs enqueued ahead of the device


class Timing(NamedTuple):
    """Microseconds per call: median, least and most of the runs."""

    us: float
    us_least: float
    us_most: float


def itself(seconds: float) -> float:
    """What the slowest process took, where there is one only."""
    return seconds


def time_per_call(
    enqueue: Callable[[], Any],
    wait: Callable[[Any], Any],
    num_calls: int = NUM_CALLS,
    slowest: Callable[[float], float] = itself,
) -> Timing:
    """Times a program of `num_calls` calls; `wait` waits for what `enqueue` returned.

    Where several processes run it together, all of them come here, and `slowest` tells each of them the most of what
    they took. It returns when all have called it, so that they also start a run together.
    """
    for _ in range(3):  # compiles, then captures
        wait(enqueue())
    slowest(0.0)
    start = time.perf_counter()
    wait(enqueue())
    repeats = max(1, min(MAX_REPEATS, int(RUN_SECONDS / slowest(time.perf_counter() - start)) + 1))
    times = []
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        for _ in range(repeats):
            result = enqueue()
        wait(result)
        times.append(slowest(time.perf_counter() - start) * 1e6 / (repeats * num_calls))
    return Timing(statistics.median(times), min(times), max(times))
