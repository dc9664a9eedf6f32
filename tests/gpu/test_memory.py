"""Memory stays flat: `python -m pytest -m gpu -s tests/gpu/test_memory.py`.

Each test is a process of its own, whose memory is looked at after a warm-up and at times from then on
(tests/gpu/memory_worker.py). XLA takes its share of the GPUs beforehand, so that what the driver has given beyond it is
the package's: counters, symmetric buffers, loaded programs.
"""

from typing import Any

import pytest

from tests.gpu import memory_worker
from tests.support import processes
from tests.support.skips import gpu_tests, why_no_group, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())

# Others may use the GPUs, and allocators round: far less than what a leak of each step would come to.
MOST_GPU_MIB = 64
MOST_XLA_BYTES = 1 << 20
MOST_HOST_KIB = {"calls": 32 << 10, "sizes": 64 << 10, "programs": 256 << 10, "groups": 256 << 10}


def looks_at(kind: str) -> list[dict[str, Any]]:
    outcomes = processes.run(memory_worker.__name__, kind, limit=240, share=0.1)
    processes.check_ended(outcomes)
    looks = [line for line in outcomes[0].lines if "done" in line]
    assert len(looks) >= 4
    return looks


@pytest.mark.parametrize("kind", memory_worker.KINDS)
def test_memory_is_flat(kind):
    if kind == "groups" and (reason := why_no_group()):
        pytest.skip(reason)
    first, *_, last = looks_at(kind)
    assert last["arrays"] <= first["arrays"]
    for before, after in zip(first["in_use"], last["in_use"], strict=True):
        assert after - before <= MOST_XLA_BYTES
    assert last["resident"] - first["resident"] <= MOST_HOST_KIB[kind]
    assert last["shared"] <= first["shared"]
    if first["used"] is not None:
        grown = max(after - before for before, after in zip(first["used"], last["used"], strict=True))
        assert grown <= MOST_GPU_MIB
