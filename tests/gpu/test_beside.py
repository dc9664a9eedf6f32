"""The layer beside independent work, under XLA's default flags: `python -m pytest -m gpu -s tests/gpu/test_beside.py`.

An NCCL kernel, or anybody's, may hold SMs of one GPU while the layer holds those of another: neither may wait for the
other one's end. 2,000 runs in each of four ways, captured or not, in one process or in one for each GPU.
"""

import functools
from typing import Any

import pytest

from tests.gpu import beside_worker
from tests.support import processes
from tests.support.skips import gpu_tests, gpus, why_no_group

pytestmark = gpu_tests(why_no_group())

LIMIT = 150  # seconds of a worker, which takes about 30
# A rank that waits for longer than this has met somebody who waits for it.
ENVIRONMENT = {"JAX_MEGAMOE_TIMEOUT_SECONDS": "3", "JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS": "12"}


@functools.cache
def outcomes(num_processes: int) -> list[processes.Outcome]:
    return processes.run(
        beside_worker.__name__, "runs", processes=num_processes, limit=LIMIT, share=0.1, environment=ENVIRONMENT
    )


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "not captured"])
@pytest.mark.parametrize("kind", beside_worker.KINDS)
@pytest.mark.parametrize("layout", ["one process", "a process for each GPU"])
def test_every_result_is_right(layout: str, kind: str, captured: bool) -> None:
    for process, outcome in enumerate(outcomes(1 if layout == "one process" else len(gpus()))):
        lines = [line for line in outcome.lines if (line.get("kind"), line.get("captured")) == (kind, captured)]
        said: list[dict[str, Any]] = lines or outcome.lines[-1:]
        print(f"process {process}: {said}")
        assert lines, (
            f"process {process} ended with status {outcome.status} before it came to it\n{outcome.errors[-3000:]}"
        )
        (line,) = lines
        if "skip" in line:
            pytest.skip(line["skip"])
        assert line["outcome"] == "ok"
        assert line["runs"] == beside_worker.RUNS


@pytest.mark.parametrize("layout", ["one process", "a process for each GPU"])
def test_workers_end_well(layout: str) -> None:
    processes.check_ended(outcomes(1 if layout == "one process" else len(gpus())))
