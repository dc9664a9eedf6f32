"""Two ranks that part ways, in processes of their own: `python -m tests.gpu.failure_worker SCENARIO`, see test_failures.py.

Each scenario is a few calls, and one line for each says what became of it on this process's ranks. What a rank does in
the call that fails depends on a number of its own, on how late its process is, or on who holds its GPU's SMs.
"""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe import expert_parallel
from jax_megamoe.primitives import _library
from tests.support import chain as chains
from tests.support.cases import SHARED
from tests.support.compare import judge
from tests.support.hlo import is_fused
from tests.support.meshes import mesh_of
from tests.support.meshes import place as place_on
from tests.support.problems import Problem, make_problem, make_weights
from tests.support.processes import Place, join, leave, meet, say
from tests.support.skips import why_no_testing

RANKS, LAYERS = 2, 3
TOKENS = 8  # of each rank
LATE = 3.0  # seconds beyond the timeout
COMMON, MORE = 20, 4  # launches of both ranks in a loop, and then of rank 0 alone
WATCHED = 1.5  # seconds: who looks at the notes does so twice a second

Wanted = Callable[[int, Any], str]  # what a rank's part of a result is


def timeout_seconds() -> float:
    return float(os.environ["JAX_MEGAMOE_TIMEOUT_SECONDS"])


class Session:
    """The ranks of this process, and a program that is right on them before anything goes wrong."""

    def __init__(self, place: Place, captured: bool) -> None:
        self.place, self.is_captured = place, captured
        self.options = chains.CAPTURED if captured else chains.NOT_CAPTURED
        self.mesh = mesh_of(jax.devices()[:RANKS], {"expert": RANKS})
        self.problem, self.placed = self.make_problem(TOKENS)
        # Before any rank waits for another one.
        self.program, self.wanted = self.compile_chain(LAYERS, self.problem, self.placed)

    def make_problem(self, tokens: int) -> tuple[Problem, list[Any]]:
        problem = make_problem(tokens * RANKS, SHARED)
        return problem, [place_on(self.mesh, value, "expert") for value in problem]

    def compile_chain(
        self, layers: int, problem: Problem, placed: Any, name: str = "chain", **options: Any
    ) -> tuple[Any, Wanted]:
        """A chain over the ranks, and what is to come of it: the bits that one device gives."""
        function = chains.chain(layers, functools.partial(mm.moe, **options))
        compiled = self.compile(function, P(None, "expert"), *placed, name=name)
        expected = np.asarray(jax.jit(function)(*problem))
        tokens = len(problem.x) // RANKS
        return compiled, lambda rank, y: judge(y, expected[:, rank * tokens : (rank + 1) * tokens])

    def compile(self, function: Callable[..., Any], out_specs: Any, *arguments: Any, name: str = "program") -> Any:
        def program(*arguments: Any) -> Any:
            return chains.per_rank(function, self.mesh, (P("expert"),) * len(arguments), out_specs)(*arguments)

        program.__name__ = name  # calls of programs with other names are other calls
        compiled = jax.jit(program, compiler_options=self.options).lower(*arguments).compile()
        assert jax.default_backend() == "cpu" or is_fused(compiled)
        return compiled

    def call(self, name: str, program: Any = None, arguments: Any = None, wanted: Wanted | None = None) -> bool:
        """Runs a program, says what came of it on each rank, and whether that was right on all."""
        begun = time.monotonic()
        ranks, error = {}, None
        try:
            result = (self.program if program is None else program)(*(self.placed if arguments is None else arguments))
            for rank, part in self.parts(result):
                verdict = (self.wanted if wanted is None else wanted)(
                    rank, np.asarray(part)
                )  # waits for this rank only
                ranks[str(rank)] = {"outcome": verdict, "seconds": round(time.monotonic() - begun, 2)}
        except jax.errors.JaxRuntimeError as raised:
            error, ranks = str(raised), {}
        seconds = round(time.monotonic() - begun, 2)
        say(call=name, ranks=ranks, error=error, seconds=seconds, failures=expert_parallel.failures())
        return error is None and all(rank["outcome"] == "right" for rank in ranks.values())

    def parts(self, result: Any) -> list[tuple[int, Any]]:
        order = list(self.mesh.devices.flat)
        return sorted(((order.index(s.device), s.data) for s in result.addressable_shards), key=lambda part: part[0])

    def own(self, *numbers: int) -> Any:
        """A number of each rank's own, as an operand."""
        return place_on(self.mesh, np.array(numbers, np.int32), "expert")

    def make_rank_1_late(self, seconds: float) -> None:
        """Its process sleeps; in one process something holds all SMs of its GPU."""
        if self.place.processes > 1:
            time.sleep(seconds if self.place.process == 1 else 0.0)
            return
        device = self.mesh.devices.flat[1]
        if reason := why_no_testing():
            say(skip=reason)
            leave(self.place, alone=True)
        _library._core.hold_sms(  # type: ignore[union-attr]
            device.local_hardware_id, getattr(device, "core_count", 132), round(seconds * 1000)
        )
        time.sleep(0.1)

    def after_failure(self) -> None:
        """The next run raises, and the one after it is right again, without a restart."""
        time.sleep(WATCHED)
        self.call("next")
        self.call("recovered")
        self.call("again")


def late(session: Session) -> None:
    """Rank 1 comes to a call when rank 0 has given up."""
    session.call("before")
    meet(session.place, "before")
    session.make_rank_1_late(timeout_seconds() + LATE)
    session.call("parted")
    session.after_failure()


def late_at_first(session: Session) -> None:
    """Later than the limit, but to the first run of a program, which has the set-up's."""
    second, wanted = session.compile_chain(LAYERS, session.problem, session.placed, routed_scaling_factor=2.0)
    session.call("before")
    meet(session.place, "before")
    session.make_rank_1_late(timeout_seconds() + LATE)
    session.call("first", second, wanted=wanted)
    session.call("again", second, wanted=wanted)


def patient(session: Session) -> None:
    """50 s late, and the limit is larger."""
    session.call("before")
    meet(session.place, "before")
    session.make_rank_1_late(50)
    session.call("late")
    session.call("again")


def dead(session: Session) -> None:
    """Process 1 dies after a call."""
    session.call("before")
    meet(session.place, "before")
    if session.place.process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    session.call("parted")
    time.sleep(WATCHED)
    for name in ("next", "rebuilt", "rebuilt again"):
        session.call(name)


def gone(session: Session) -> None:
    """Rank 0 goes on with a loop, whose body is a graph, when rank 1 has left it."""

    def count_nans(turns: Any, *arguments: Any) -> jax.Array:
        """In how many of turns[0] launches each number of the result was NaN."""
        none = jnp.zeros(arguments[0].shape, jnp.int32)
        return jax.lax.fori_loop(0, turns[0], lambda _, nans: nans + jnp.isnan(mm.moe(*arguments)), none)

    def wanted(rank: int, nans: Any) -> str:
        return "right" if not nans.any() else f"nan {nans.min()} to {nans.max()} times"

    loop = session.compile(count_nans, P("expert"), session.own(1, 1), *session.placed)
    session.call("before", loop, (session.own(1, 1), *session.placed), wanted)
    session.call("parted", loop, (session.own(COMMON + MORE, COMMON), *session.placed), wanted)
    session.after_failure()


def run_branches(session: Session, branches: Sequence[Callable[..., Any]], expected: Sequence[Any]) -> None:
    """A program in which a rank's number is that of its branch: all in each of them, then each rank in another one."""

    def branch(number: Any, *arguments: Any) -> jax.Array:
        return jax.lax.cond(number[0] == 0, *(functools.partial(run, *arguments) for run in branches))

    def wanted(number: int) -> Wanted:
        part = lambda rank: slice(rank * TOKENS, (rank + 1) * TOKENS)  # noqa: E731
        return lambda rank, y: judge(y, expected[number][part(rank)])

    program = session.compile(branch, P("expert"), session.own(0, 0), *session.placed)
    for number in (0, 1):  # each call's first launch has the set-up's limit
        session.call(f"branch {number}", program, (session.own(number, number), *session.placed), wanted(number))
    session.call("before")
    meet(session.place, "before")
    session.call("parted", program, (session.own(0, 1), *session.placed), wanted(0))
    session.after_failure()
    session.call("branch 1 again", program, (session.own(1, 1), *session.placed), wanted(1))


def other_shape(session: Session) -> None:
    """Rank 0 has half as many tokens in a call as rank 1."""

    def call(tokens: int, x: Any, weights: Any, ids: Any, topk_weights: Any) -> jax.Array:
        y = mm.moe(x[:tokens], weights, ids[:tokens], topk_weights[:tokens])
        return jnp.concatenate([y] * (TOKENS // tokens))

    alone = np.asarray(jax.jit(mm.moe)(*session.problem))
    half = np.concatenate([np.concatenate([y[: TOKENS // 2]] * 2) for y in np.split(alone, RANKS)])
    branches = [functools.partial(call, TOKENS // 2), functools.partial(call, TOKENS)]
    run_branches(session, branches, [half, alone])


def in_order(weights: Any, first: int, x: Any, ids: Any, topk_weights: Any) -> jax.Array:
    """Two layers of equal shapes, beginning with the one or the other."""
    y = mm.moe(x, weights[first], ids, topk_weights)
    return mm.moe(jnp.where(y > 0, x, -x), weights[1 - first], ids, topk_weights)


def other_call(session: Session) -> None:
    """The ranks have two calls of equal shapes in another order."""
    second = make_weights(SHARED, seed=1)
    placed = place_on(session.mesh, second, "expert")
    x, weights, ids, topk_weights = session.problem
    expected = [
        np.asarray(jax.jit(functools.partial(in_order, (weights, second), i))(x, ids, topk_weights)) for i in (0, 1)
    ]

    def call(first: int, x: Any, weights: Any, ids: Any, topk_weights: Any, second: Any) -> jax.Array:
        return in_order((weights, second), first, x, ids, topk_weights)

    only_placed, session.placed = session.placed, [*session.placed, placed]
    program, wanted = session.program, session.wanted
    session.program = lambda *arguments: program(*only_placed)
    session.wanted = wanted
    run_branches(session, [functools.partial(call, 0), functools.partial(call, 1)], expected)


def other_program(session: Session) -> None:
    """The processes have two programs of equal shapes in another order."""
    programs = [
        session.compile_chain(1, session.problem, session.placed, name, activation_clamp=clamp)
        for name, clamp in (("draft", 6.0), ("target", 7.0))
    ]
    for i, (program, wanted) in enumerate(programs):
        session.call(f"program {i}", program, wanted=wanted)
    session.call("before")
    meet(session.place, "before")
    program, wanted = programs[session.place.process]
    session.call("parted", program, wanted=wanted)
    session.after_failure()


def set_up_again(session: Session) -> None:
    """A call needs a larger buffer, and process 1 comes to it when process 0 has given up its first try."""
    problem, placed = session.make_problem(16 * TOKENS)
    larger, wanted = session.compile_chain(LAYERS, problem, placed)
    session.call("before")
    meet(session.place, "before")
    if session.place.process == 1:
        time.sleep(float(os.environ["JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS"]) + 3)
    for number in range(4):
        if session.call(f"try {number}", larger, placed, wanted):
            break
    session.call("again", larger, placed, wanted)
    session.call("smaller")


def wrong_order(session: Session) -> None:
    """A program whose mesh has its ranks in another order than the communicator."""
    session.call("before")
    axis_index, asked = jax.lax.axis_index, []

    def other_index(axes: Any) -> jax.Array:
        asked.append(axes)
        return RANKS - 1 - axis_index(axes)

    with mock.patch.object(jax.lax, "axis_index", other_index):
        wrong = session.compile(chains.chain(1), P(None, "expert"), *session.placed)
    if not asked:
        say(skip="no call of the layer asks for its rank in the mesh")
        return
    session.call("parted", wrong)
    session.after_failure()


SCENARIOS: dict[str, Callable[[Session], None]] = {
    scenario.__name__: scenario
    for scenario in (
        late,
        late_at_first,
        patient,
        dead,
        gone,
        other_shape,
        other_call,
        other_program,
        set_up_again,
        wrong_order,
    )
}


def main(scenario: str, captured: str = "captured") -> None:
    place = join()
    SCENARIOS[scenario](Session(place, captured == "captured"))
    leave(place, alone=scenario == "dead")


if __name__ == "__main__":
    main(*sys.argv[1:])
