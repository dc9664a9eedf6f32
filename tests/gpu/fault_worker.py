"""Faults that come from outside to two ranks: `python -m tests.gpu.fault_worker SCENARIO`, see test_failures.py.

Processes that are killed, interrupted or forked, another client of JAX, memory that is not there. A `Session` of
failure_worker.py says a line for each call.
"""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from tests.gpu.failure_worker import LATE, LAYERS, TOKENS, WATCHED, Session, timeout_seconds
from tests.support.gpu_memory import fill
from tests.support.problems import make_weights
from tests.support.processes import join, leave, meet, say

# Seconds that a program of many launches takes, and after how many of them a process is killed.
LONG_RUN, KILLED_AFTER = 4.0, 0.7
TRIAL = 500  # launches that are timed first


def signal_after(seconds: float, number: signal.Signals) -> None:
    """To this process."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def killed(session: Session) -> None:
    """Process 1 is killed in the middle of a program of many launches, most likely in one of them."""

    def many(turns: Any, *arguments: Any) -> jax.Array:
        """In how many of turns[0] launches each number of the result was NaN."""
        none = jnp.zeros(arguments[0].shape, jnp.int32)
        return jax.lax.fori_loop(0, turns[0], lambda _, nans: nans + jnp.isnan(mm.moe(*arguments)), none)

    def wanted(rank: int, nans: Any) -> str:
        return "right" if not nans.any() else "nan from some launch on"

    loop = session.compile(many, P("expert"), session.own(1, 1), *session.placed)
    for name in ("before", "timed"):
        begun = time.monotonic()
        session.call(name, loop, (session.own(TRIAL, TRIAL), *session.placed), wanted)
    turns = round(TRIAL * LONG_RUN / (time.monotonic() - begun))
    meet(session.place, "timed")
    if session.place.process == 1:
        signal_after(KILLED_AFTER, signal.SIGKILL)
    session.call("parted", loop, (session.own(turns, turns), *session.placed), wanted)
    if session.place.process == 1:
        time.sleep(60)  # it has been too quick
    time.sleep(WATCHED)
    for name in ("next", "rebuilt"):
        session.call(name)


def killed_in_set_up(session: Session) -> None:
    """A call needs a larger buffer; process 1 is killed when process 0 waits for it in the set-up."""
    problem, placed = session.make_problem(16 * TOKENS)
    larger, wanted = session.compile_chain(LAYERS, problem, placed)
    session.call("before")
    meet(session.place, "before")
    if session.place.process == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    for name in ("parted", "next"):
        session.call(name, larger, placed, wanted)


def interrupted(session: Session) -> None:
    """Somebody presses Ctrl-C where process 0 waits for process 1, and goes on."""
    session.call("before")
    meet(session.place, "before")
    session.make_rank_1_late(timeout_seconds() + LATE)
    if session.place.process == 0:
        signal_after(1.0, signal.SIGINT)
    begun = time.monotonic()
    try:
        session.call("parted")
        time.sleep(2)  # the signal may be told of as late as here
    except KeyboardInterrupt:
        say(interrupted=round(time.monotonic() - begun, 2))
        time.sleep(max(0.0, begun + timeout_seconds() + 1 - time.monotonic()))  # until its launch has given up
    session.after_failure()


def forked(session: Session) -> None:
    """Children end, as those of `multiprocessing` do, while their parent is in a group."""
    session.call("before")
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(7)
        session.call("beside a child")
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
    session.call("again")


def second_client(session: Session) -> None:
    """Another client of JAX in the same process, with a group of its own, beside what is left of the first."""
    session.call("before")
    jax.extend.backend.clear_backends()
    make_weights.cache_clear()  # they are the first client's
    second = Session(session.place, session.is_captured)
    second.call("second")
    del session.program, session.placed, session.problem
    gc.collect()
    second.call("again")


def works(session: Session) -> None:
    """Nothing happens."""
    session.call("first")
    session.call("again")


def no_memory(session: Session) -> None:
    """The device of rank 1 has no room for a larger buffer; then it has."""
    problem, placed = session.make_problem(2048 * TOKENS)  # 30 MB and more
    larger, wanted = session.compile_chain(1, problem, placed)
    session.call("before")
    meet(session.place, "before")
    device = session.mesh.devices.flat[1]
    mine = device.process_index == jax.process_index()
    release = fill(device.local_hardware_id, leave=4 << 20) if mine else None
    meet(session.place, "filled")
    for name in ("parted", "next"):
        session.call(name, larger, placed, wanted)
    session.call("smaller")
    if release is not None:
        release()
    meet(session.place, "released")
    session.call("larger", larger, placed, wanted)
    session.call("again")


SCENARIOS: dict[str, Callable[[Session], None]] = {
    scenario.__name__: scenario
    for scenario in (killed, killed_in_set_up, interrupted, forked, second_client, works, no_memory)
}


def main(scenario: str, captured: str = "captured") -> None:
    place = join()
    SCENARIOS[scenario](Session(place, captured == "captured"))
    leave(place, alone=scenario.startswith("killed"))


if __name__ == "__main__":
    main(*sys.argv[1:])
