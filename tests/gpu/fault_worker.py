"""Faults that come from outside to two ranks: `python -m tests.gpu.fault_worker SCENARIO`, see test_failures.py.

Processes that are killed, interrupted or forked, another client of JAX, memory that is not there. A `Session` of
failure_worker.py says a line for each call.
"""

import functools
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from tests.gpu.failure_worker import LATE, LAYERS, TOKENS, WATCHED, Session, timeout_seconds
from tests.support.gpu_memory import fill
from tests.support.problems import make_weights
from tests.support.processes import join, leave, meet, say, signal_after

KILLED_AFTER = 2.0  # seconds
# Launches of a program that are left when a wait of one has failed, captured or enqueued one by one: of so many, a
# millisecond each would be far above what a set-up takes.
LEFT = {True: 10_000, False: 6_000}


def launches_until(nans: int, most: Any, *arguments: Any) -> jax.Array:
    """Launch after launch, `most[0]` or until so many had a result that is not finite: all, and those."""

    def goes_on(counts: jax.Array) -> jax.Array:
        return (counts[0] < most[0]) & (counts[1] < nans)

    def launch(counts: jax.Array) -> jax.Array:
        return counts + jnp.stack([jnp.int32(1), jnp.isnan(mm.moe(*arguments)).any().astype(jnp.int32)])

    return jax.lax.while_loop(goes_on, launch, jnp.zeros(2, jnp.int32))


def killed(session: Session) -> None:
    """Process 1 is killed in the middle of a program of launches without end, most likely in one of them.

    Process 0 goes on until it has failed in so many, however quick the GPUs are or busy with others.
    """

    def wanted(rank: int, counts: Any) -> str:
        launches, nans = (int(count) for count in counts)
        return "right" if nans == 0 else f"nan in {nans} of more launches" if launches > nans else "nan in all launches"

    left = LEFT[session.is_captured]
    loop = session.compile(functools.partial(launches_until, left), P("expert"), session.own(1, 1), *session.placed)
    for name, most in (("before", 1), ("timed", left)):
        session.call(name, loop, (session.own(most, most), *session.placed), wanted)
    meet(session.place, "timed")
    if session.place.process == 1:
        signal_after(KILLED_AFTER, signal.SIGKILL)
    without_end = np.iinfo(np.int32).max
    session.call("parted", loop, (session.own(without_end, without_end), *session.placed), wanted)
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
