"""Random layers against the reference, side by side, until something is wrong or the time is over:

    python -m tests.soak --seconds 600 --seed 0 [--ranks 2]

Several threads run a changing set of compiled programs, captured in CUDA graphs and not, on one GPU and on all of
them, while others multiply, copy between host and device, and run XLA's collectives. A program's first run is compared
with the reference, every other run with the first one by bits, and all that is beside them with exact numbers. Prints
what was run; at the first wrong value the case, and how to run it again, and exits with 1; where nothing moves for
`--patience` seconds, where each thread is, and exits with 1 too. Which thread runs when is not repeated by the seed.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_megamoe import expert_parallel
from tests.soak import beside
from tests.soak.cases import Case, Program
from tests.support.meshes import mesh_of

LIVE = 6  # programs at a time
SECONDS_BETWEEN_LINES = 10.0


class Soak:
    """The programs that live, and what the threads have to say."""

    def __init__(self, devices: list[Any], options: argparse.Namespace) -> None:
        self.options, self.devices = options, devices
        self.mesh: Mesh | None = mesh_of(devices, {"expert": len(devices)}) if len(devices) > 1 else None
        self.programs: list[Program] = []
        self.counts: dict[str, int] = {}
        self.wrong: list[str] = []
        self._over, self._lock, self._order = threading.Event(), threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def in_order(self, ranks: int) -> Iterator[None]:
        """Programs of several devices are started one after the other, or devices would have them in other orders."""
        with self._order if ranks > 1 else contextlib.nullcontext():
            yield

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def fail(self, text: str) -> None:
        with self._lock:
            self.wrong.append(text)
        self._over.set()

    def add(self, number: int) -> None:
        """One more program, the oldest going for it."""
        case = Case.draw(self.options.seed, number, len(self.devices), self.options.tokens)
        place = self.mesh if self.mesh is not None and case.ranks > 1 else self.devices[number % len(self.devices)]
        program = Program(case, place, lambda case: self.in_order(case.ranks))
        if program.wrong:
            self.fail(f"{case}: {program.wrong}")
        self.count("cases")
        if program.is_fused:
            self.count("cases of one kernel for all ranks")
        with self._lock:
            self.programs = [*self.programs, program][-LIVE:]

    def run_programs(self, seed: int) -> None:
        random = np.random.default_rng([self.options.seed, seed])
        while not self._over.is_set():
            programs = self.programs
            if not programs:
                self._over.wait(0.01)
                continue
            program = programs[random.integers(len(programs))]
            if not np.array_equal(found := program.run(), program.wanted):
                self.fail(f"{program.case}: {int((found != program.wanted).sum())} numbers differ from the first run")
            self.count("runs")

    def repeat(self, name: str, once: Callable[[int], str]) -> None:
        """Something beside the programs, until the time is over."""
        number = 0
        while not self._over.is_set():
            if text := once(number):
                self.fail(f"{name} {number}: {text}")
            self.count(name)
            number += 1

    def watch(self) -> None:
        """Ends the process where nothing has been done for too long: a device that hangs cannot be waited for."""
        seen, since = 0, time.monotonic()
        while not self._over.wait(0.1):
            done = sum(self.counts.values())
            if done != seen:
                seen, since = done, time.monotonic()
            elif time.monotonic() - since > self.options.patience:
                live = [program.case for program in self.programs]
                print(f"HANG: nothing done for {self.options.patience:g} s after {self.counts}; {live}", flush=True)
                faulthandler.dump_traceback(file=2)  # standard error, whatever stands in its place
                os._exit(1)

    def guarded(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            self.fail(f"{type(error).__name__}: {str(error)[:600]}; failures {expert_parallel.failures()}")

    def run(self) -> int:
        """All threads until the time is over; the exit status."""
        begun = said = time.monotonic()
        work: list[tuple[Any, ...]] = [(self.run_programs, thread) for thread in range(self.options.threads)]
        work += [(self.repeat, name, once) for name, once in beside.all_work(self.devices, self.mesh, self.in_order)]
        threads = [threading.Thread(target=self.guarded, args=item, daemon=True) for item in work]
        threading.Thread(target=self.watch, daemon=True).start()
        for thread in threads:
            thread.start()
        number = self.options.case if self.options.case is not None else 0
        # However short the time is, something has been run.
        while not self._over.is_set() and (
            "runs" not in self.counts or time.monotonic() - begun < self.options.seconds
        ):
            if self.options.case is None or not self.programs:
                self.guarded(self.add, number)
                number += 1
            else:
                self._over.wait(0.1)
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{said - begun:.0f} s: {self.counts}", flush=True)
        self._over.set()
        for thread in threads:
            thread.join()
        seconds = round(time.monotonic() - begun, 1)
        print(json.dumps({"seed": self.options.seed, "ranks": len(self.devices), "seconds": seconds, **self.counts}))
        for text in self.wrong:
            print(f"WRONG: {text}")
        if self.wrong:
            given = f"--seed {self.options.seed} --ranks {len(self.devices)} --tokens {self.options.tokens}"
            print(f"Again: python -m tests.soak {given}, of one case with --case NUMBER.")
        return int(bool(self.wrong))


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is no positive number")
    return number


def _not_negative(text: str) -> int:
    return int(text) and _positive(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=_not_negative, default=0, help="of a group; 0: all devices of this process")
    parser.add_argument("--threads", type=_positive, default=3, help="that run programs")
    parser.add_argument("--tokens", type=_positive, default=8192, help="of a call, at most")
    parser.add_argument("--case", type=int, default=None, help="the number of the only case")
    parser.add_argument("--patience", type=float, default=180, help="seconds without anything done that are a hang")
    options = parser.parse_args(arguments)
    devices = jax.devices()
    ranks = options.ranks or 1 << (len(devices).bit_length() - 1)
    if ranks > len(devices):
        parser.error(f"--ranks is {ranks}, wanted at most the {len(devices)} devices of this process")
    return Soak(devices[:ranks], options).run()


if __name__ == "__main__":
    sys.exit(main())
