"""Ranks on two GPUs that part ways, or are killed: `python -m pytest -m gpu -s tests/gpu/test_failures.py`.

In one process with both GPUs, and in one for each. What is asked of every rank: a failed call is NaN, or, where the
rank's own part came about, right; the next run of any program raises an error that names rank, peer, phase and epoch;
the one after it is right again. All of it for captured programs too.
"""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.gpu import failure_worker, fault_worker
from tests.gpu.failure_worker import COMMON, LATE, LAYERS, MORE
from tests.support import processes
from tests.support.processes import Outcome
from tests.support.skips import gpu_tests, why_no_group

pytestmark = gpu_tests(why_no_group())

LIMIT, SETUP = 3.0, 20.0
SLACK = 3.0  # of a limit, where several workers share the GPUs; one second is what is meant
AT_ONCE = 6  # workers

full_suite = pytest.mark.skipif(
    "MEGAMOE_FULL_SUITE" not in os.environ,
    reason="takes a minute: set MEGAMOE_FULL_SUITE, as scripts/gpu_tests.py does",
)
both_layouts = pytest.mark.parametrize("layout", [1, 2], ids=["one process", "two processes"])
one_process = pytest.mark.parametrize("layout", [1], ids=["one process"])
two_processes = pytest.mark.parametrize("layout", [2], ids=["two processes"])
captured_or_not = pytest.mark.parametrize("captured", ["captured", "not captured"])
captured = pytest.mark.parametrize("captured", ["captured"])

Key = tuple[str, int, str]
# A set-up that a test waits for to end in vain; a limit that a rank is not to come to.
SETTINGS = {
    **{name: {"JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS": "5"} for name in ("dead", "killed", "killed_in_set_up")},
    "set_up_again": {"JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS": "5"},
    "patient": {"JAX_MEGAMOE_TIMEOUT_SECONDS": "120"},
}


def run_worker(scenario: str, layout: int, captured: str) -> list[Outcome]:
    settings = {"JAX_MEGAMOE_TIMEOUT_SECONDS": f"{LIMIT:g}", "JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS": f"{SETUP:g}"}
    environment = {**settings, **SETTINGS.get(scenario, {})}
    limit = 120 if scenario == "patient" else 75
    worker = fault_worker if scenario in fault_worker.SCENARIOS else failure_worker
    return processes.run(
        worker.__name__, scenario, captured, processes=layout, limit=limit, share=0.02, environment=environment
    )


@pytest.fixture(scope="module")
def workers(request: pytest.FixtureRequest) -> Iterator[dict[Key, "Future[list[Outcome]]"]]:
    """The workers of all tests of this file that are to run, several at once: each has a group of its own."""
    wanted: list[Key] = []
    for item in request.session.items:
        if item.path == request.path and "workers" in getattr(item, "fixturenames", ()):
            if item.get_closest_marker("skipif") and any(m.args[0] for m in item.iter_markers("skipif")):
                continue
            wanted.append(key_of(item))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        # The slow one first, and beside the others.
        futures = {key: pool.submit(run_worker, *key) for key in sorted(wanted, key=lambda key: key[0] != "patient")}
        yield futures
        pool.shutdown(cancel_futures=True)


def key_of(item: Any) -> Key:
    parameters = item.callspec.params
    return item.originalname.removeprefix("test_"), parameters["layout"], parameters["captured"]


class Calls:
    """What the processes said about their calls."""

    def __init__(self, outcomes: list[Outcome], statuses: list[int] | None = None) -> None:
        processes.check_ended(outcomes, statuses)
        self.outcomes, self.layout = outcomes, len(outcomes)
        for line in outcomes[0].lines:
            if "skip" in line:
                pytest.skip(line["skip"])

    def line(self, rank: int, call: str) -> dict[str, Any]:
        """What the rank's process said about a call."""
        lines = [line for line in self.outcomes[self.process(rank)].lines if line.get("call") == call]
        assert len(lines) == 1, f"rank {rank} has {len(lines)} calls {call!r}"
        return lines[0]

    def process(self, rank: int) -> int:
        return rank if self.layout > 1 else 0

    def check(self, call: str, *outcomes: str) -> None:
        """Rank r's outcome of the call, without an error."""
        for rank, outcome in enumerate(outcomes):
            line = self.line(rank, call)
            assert line["error"] is None, f"rank {rank}, {call}: {line['error']}"
            assert line["ranks"][str(rank)]["outcome"] == outcome, f"rank {rank}, {call}"

    def right(self, *calls: str) -> None:
        for call in calls:
            self.check(call, "right", "right")

    def seconds(self, rank: int, call: str) -> float:
        line = self.line(rank, call)
        return float(line["ranks"][str(rank)]["seconds"] if line["ranks"] else line["seconds"])

    def check_sentences(self, call: str, *sentences: str) -> None:
        """After the call `failures()` of rank r's process has its sentence, as a pattern, and the standard error, too."""
        for rank, sentence in enumerate(sentences):
            found = self.line(rank, call)["failures"]
            assert any(re.match(sentence, text) for text in found), f"rank {rank}: {sentence!r} is not in {found}"
            errors = self.outcomes[self.process(rank)].errors
            assert re.search(f"^jax_megamoe: {sentence}", errors, re.MULTILINE), f"rank {rank}: {errors[-2000:]}"
        if self.layout == 1:
            assert len(self.line(0, call)["failures"]) == len(sentences)

    def check_recovery(self, *sentences: str) -> None:
        """The next run raises on every rank, with its sentence or, in one process, another rank's; then all is well."""
        for rank in range(2):
            line, possible = self.line(rank, "next"), sentences if self.layout == 1 else sentences[rank : rank + 1]
            assert line["error"] is not None, f"rank {rank}: no error after the failure"
            assert any(re.search(text, line["error"]) for text in possible), line["error"]
            assert line["seconds"] < 1 + SLACK, f"rank {rank}: the error took {line['seconds']} s"
        self.right("recovered", "again")
        for rank in range(2):
            assert self.line(rank, "again")["failures"] == []


def waited(rank: int, epoch: int, phase: str = "routing") -> str:
    return f"rank {rank} waited in vain for rank {1 - rank}, phase {phase}, epoch {epoch}:"


def told(rank: int, epoch: int, phase: str = "routing") -> str:
    return f"rank {rank} was told that rank {1 - rank} waited in vain for rank {rank}, phase {phase}, epoch {epoch}:"


def either(rank: int, epoch: int) -> str:
    """Both ranks wait: who comes first to the limit tells the other."""
    return f"({waited(rank, epoch)}|{told(rank, epoch)})"


@pytest.fixture
def outcome(request: pytest.FixtureRequest, workers: dict[Key, "Future[list[Outcome]]"]) -> Callable[..., Calls]:
    return lambda *statuses: Calls(workers[key_of(request.node)].result(), list(statuses) or None)


@both_layouts
@captured_or_not
def test_late(outcome, layout, captured):
    calls, epoch = outcome(), LAYERS + 1
    calls.right("before")
    calls.check("parted", "nan", "nan")
    assert LIMIT - 0.5 < calls.seconds(0, "parted") < LIMIT + SLACK
    # From when rank 1 comes.
    assert calls.seconds(1, "parted") < SLACK + (LIMIT + LATE if layout == 1 else 0)
    sentences = waited(0, epoch), told(1, epoch)
    calls.check_sentences("parted", *sentences)
    calls.check_recovery(*sentences)


@both_layouts
@captured
def test_late_at_first(outcome, layout, captured):
    calls = outcome()
    calls.right("before", "first", "again")
    assert calls.seconds(0, "first") > LIMIT, "rank 1 was not late"


@full_suite
@two_processes
@captured
def test_patient(outcome, layout, captured):
    calls = outcome()
    calls.right("before", "late", "again")
    assert calls.seconds(0, "late") > 45, "rank 1 was not late"


@two_processes
@captured_or_not
def test_dead(outcome, layout, captured):
    calls, epoch, setup = outcome(0, -9), LAYERS + 1, float(SETTINGS["dead"]["JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS"])
    line = calls.line(0, "parted")
    assert line["error"] is None and line["ranks"]["0"]["outcome"] == "nan"
    assert calls.seconds(0, "parted") < LIMIT + SLACK
    calls.check_sentences("parted", waited(0, epoch))
    for call in ("next", "rebuilt", "rebuilt again"):
        line = calls.line(0, call)
        assert line["error"] is not None, f"{call}: {line['ranks']}"
        assert line["seconds"] < setup + SLACK
    assert re.search(waited(0, epoch), calls.line(0, "next")["error"])


@one_process
@captured
def test_gone(outcome, layout, captured):
    """Rank 0 alone launches more: rank 1's results are right, and it has launched nothing in which it could be told."""
    calls, epoch = outcome(), 1 + COMMON + 1
    calls.right("before")
    calls.check("parted", f"nan {MORE} to {MORE} times", "right")
    calls.check_sentences("parted", waited(0, epoch))
    calls.check_recovery(waited(0, epoch))


@both_layouts
@captured
def test_other_shape(outcome, layout, captured):
    check_parted_branches(outcome(), epoch=1 + 1 + LAYERS + 1)


@both_layouts
@captured
def test_other_call(outcome, layout, captured):
    check_parted_branches(outcome(), epoch=2 + 2 + LAYERS + 1)


def check_parted_branches(calls: Calls, epoch: int) -> None:
    calls.right("branch 0", "branch 1", "before")
    check_both_wait(calls, epoch)
    calls.right("branch 1 again")


@two_processes
@captured_or_not
def test_other_program(outcome, layout, captured):
    calls = outcome()
    calls.right("program 0", "program 1", "before")
    check_both_wait(calls, epoch=1 + 1 + LAYERS + 1)


def check_both_wait(calls: Calls, epoch: int) -> None:
    calls.check("parted", "nan", "nan")
    for rank in range(2):
        assert calls.seconds(rank, "parted") < LIMIT + SLACK
    sentences = either(0, epoch), either(1, epoch)
    calls.check_sentences("parted", *sentences)
    failures = [text for rank in range(2) for text in calls.line(rank, "parted")["failures"]]
    assert any("was told" not in text for text in failures), "somebody has to have waited"
    calls.check_recovery(*sentences)


@two_processes
@captured
def test_set_up_again(outcome, layout, captured):
    calls, setup = outcome(), float(SETTINGS["set_up_again"]["JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS"])
    calls.right("before", "again", "smaller")
    tries = [[line for line in each.lines if line.get("call", "").startswith("try")] for each in calls.outcomes]
    assert len(tries[0]) > 1, "process 0 was to give up its first try"
    for rank, lines in enumerate(tries):
        assert lines[-1]["ranks"][str(rank)]["outcome"] == "right"
        assert all(line["error"] and line["seconds"] < setup + SLACK for line in lines[:-1])


@one_process
@captured
def test_wrong_order(outcome, layout, captured):
    calls = outcome()
    calls.right("before")
    calls.check("parted", "nan", "nan")
    assert calls.seconds(0, "parted") < SLACK, "nobody has to wait to see it"
    sentence = r"rank \d of XLA's communicator is rank \d of the mesh, epoch \d+:"
    calls.check_sentences("parted", *(f"(rank {rank} was told that )?{sentence}" for rank in range(2)))
    calls.check_recovery(sentence)


# Faults from outside.


@two_processes
@captured_or_not
def test_killed(outcome, layout, captured):
    """In mid-launch. The other rank says so, and another pair of processes works at once, on the same GPUs."""
    calls, setup = outcome(0, -9), float(SETTINGS["killed"]["JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS"])
    calls.right("before", "timed")
    line = calls.line(0, "parted")
    wanted = f"nan in {fault_worker.LEFT[captured == 'captured']} of more launches"
    assert line["error"] is None and line["ranks"]["0"]["outcome"] == wanted, line
    # Those that are left take no longer than others.
    left = 1.5 * calls.seconds(0, "timed")
    assert calls.seconds(0, "parted") < fault_worker.KILLED_AFTER + LIMIT + 1 + left, line
    sentence = r"rank 0 waited in vain for rank 1, phase [a-z ]+, epoch \d+:"
    calls.check_sentences("parted", sentence)
    for call in ("next", "rebuilt"):
        line = calls.line(0, call)
        assert line["error"] is not None and line["seconds"] < setup + SLACK, f"{call}: {line}"
    assert re.search(sentence, calls.line(0, "next")["error"])
    Calls(run_worker("works", layout, captured)).right("first", "again")


@two_processes
@captured
def test_killed_in_set_up(outcome, layout, captured):
    calls, setup = outcome(0, -9), float(SETTINGS["killed_in_set_up"]["JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS"])
    calls.right("before")
    for call in ("parted", "next"):
        line = calls.line(0, call)
        assert "the other ranks did not come within 5 s" in str(line["error"]), line
        assert line["seconds"] < setup + SLACK
    Calls(run_worker("works", layout, captured)).right("first", "again")


@two_processes
@captured
def test_interrupted(outcome, layout, captured):
    calls, epoch = outcome(), LAYERS + 1
    calls.right("before")
    (seconds,) = [line["interrupted"] for line in calls.outcomes[0].lines if "interrupted" in line]
    assert seconds < LIMIT + SLACK, "Ctrl-C has to come through within the limit"
    assert calls.line(1, "parted")["ranks"]["1"]["outcome"] == "nan"
    calls.check_recovery(waited(0, epoch), told(1, epoch))


@both_layouts
@captured
def test_forked(outcome, layout, captured):
    calls = outcome()
    calls.right("before", "again")
    for each in calls.outcomes:
        lines = [line for line in each.lines if line["call"] == "beside a child"]
        assert len(lines) == 3
        assert all(rank["outcome"] == "right" for line in lines for rank in line["ranks"].values()), lines


@one_process
@captured
def test_second_client(outcome, layout, captured):
    outcome().right("before", "second", "again")
