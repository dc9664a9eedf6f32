"""`python -m tests.soak` for some seconds on host devices, and that it finds what is wrong."""

import json
import time
from typing import Any

import numpy as np
import pytest

from tests.soak import __main__ as soak
from tests.soak.cases import Case, Program

SHORT = ["--case", "5", "--seconds", "0.5", "--tokens", "32", "--threads", "2", "--ranks", "2", "--patience", "200"]


def counts(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("{")]
    return json.loads(line), out


def test_all_kinds_of_work_are_run_and_right(capsys):
    assert soak.main(SHORT) == 0
    found, _ = counts(capsys)
    for what in ("cases", "runs", "multiplications", "copies", "poisonings", "collectives"):
        assert found[what] > 0


def test_a_seed_gives_the_same_cases():
    drawn = [[Case.draw(seed, number, 2, 8192) for number in range(50)] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    for what in ("ranks", "format", "is_captured", "routing"):
        assert len({getattr(case, what) for case in drawn[0]}) > 1


@pytest.mark.parametrize("what", ["a run", "the reference", "an error"])
def test_the_first_wrong_value_ends_it(what, monkeypatch, capsys):
    run = Program.run

    def wrong_run(self: Program) -> np.ndarray:
        is_first = not hasattr(self, "wanted")
        if what == "an error":
            raise RuntimeError("lost")
        bits = run(self).copy()
        if is_first == (what == "the reference"):
            bits[0, 0] ^= 0x0040  # a token of other numbers
        return bits

    monkeypatch.setattr(Program, "run", wrong_run)
    assert soak.main([*SHORT, "--seconds", "60"]) == 1
    found, out = counts(capsys)
    said = {"a run": "differ from the first run", "the reference": "from the reference", "an error": "lost"}[what]
    assert said in out and found["seconds"] < 60
    assert what == "an error" or "number=5" in out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_where_nothing_moves_it_ends(monkeypatch, capsys):
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit  # of the thread that watches

    monkeypatch.setattr(soak.os, "_exit", end)
    for thing in ("add", "repeat"):
        monkeypatch.setattr(soak.Soak, thing, lambda *_: time.sleep(2))
    monkeypatch.setattr(soak.Soak, "run_programs", lambda self, _: self.count("runs"))
    soak.main(["--seconds", "1", "--patience", "0.5", "--ranks", "1"])
    assert ended == [1] and "HANG: nothing done for 0.5 s" in capsys.readouterr().out
