"""A process with one GPU that is killed, or has no memory for a call: `python -m pytest -m gpu tests/gpu/test_single_gpu_faults.py`."""

import re

import pytest

from tests.gpu import single_gpu_worker
from tests.support import processes
from tests.support.skips import gpu_tests, why_no_hopper, why_no_kernel

pytestmark = gpu_tests(why_no_hopper() or why_no_kernel())

captured_or_not = pytest.mark.parametrize("captured", ["captured", "not captured"])
SHARE = 0.01  # of the GPU's memory: 1.4 GB of an H200


def run(scenario: str, captured: str, *statuses: int) -> dict[str, dict]:
    """What the worker said, by call."""
    outcomes = processes.run(single_gpu_worker.__name__, scenario, captured, limit=90, share=SHARE)
    processes.check_ended(outcomes, list(statuses) or None)
    return {line["call"]: line for line in outcomes[0].lines if "call" in line}


@captured_or_not
def test_no_memory_for_scratch(captured):
    """XLA says how much it lacks, at once and again; smaller calls go on; with the memory back all is right."""
    lines = run("no_scratch", captured)
    for call in ("large", "large again"):
        error = str(lines[call]["error"])
        assert re.search(r"RESOURCE_EXHAUSTED: Out of memory[^\n]* \d", error), lines[call]
        assert lines[call]["seconds"] < 30, lines[call]
    for call in ("small", "freed", "small after"):
        assert lines[call]["error"] is None and lines[call]["outcome"] == "right", lines[call]


@captured_or_not
def test_killed(captured):
    """In mid-launch; another process on the same GPU works at once."""
    assert set(run("killed", captured, -9)) == {"before"}, "the program was to be in the middle of its launches"
    lines = run("works", captured)
    for call in ("first", "again"):
        assert lines[call]["difference"] < 1e-4, lines[call]
    assert lines["again"]["seconds"] < 1, lines["again"]
