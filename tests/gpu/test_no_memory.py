"""No room on one GPU for what its ranks share: `python -m pytest -m gpu tests/gpu/test_no_memory.py`.

Apart from the other failures, which run side by side on the same GPUs: for some seconds nobody else gets any memory.
"""

import re

import pytest

from tests.gpu import fault_worker
from tests.support import processes
from tests.support.skips import gpu_tests, why_no_group

pytestmark = gpu_tests(why_no_group())

SENTENCE = r"rank 1: cudaMalloc of \d+ bytes beside JAX's own pool failed: [^;]*; leave room for it with a smaller XLA_"


@pytest.mark.parametrize("layout", [1, 2], ids=["one process", "two processes"])
def test_no_memory_for_a_buffer(layout):
    environment = {"JAX_MEGAMOE_TIMEOUT_SECONDS": "5", "JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS": "20"}
    outcomes = processes.run(
        *(fault_worker.__name__, "no_memory", "not captured"),
        processes=layout,
        limit=120,
        share=0.02,
        environment=environment,
    )
    processes.check_ended(outcomes)
    for outcome in outcomes:
        lines = {line["call"]: line for line in outcome.lines}
        for call in ("parted", "next"):
            assert re.search(SENTENCE, str(lines[call]["error"])), lines[call]
            assert lines[call]["seconds"] < 10
        for call in ("before", "smaller", "larger", "again"):
            assert lines[call]["error"] is None, lines[call]
            assert all(rank["outcome"] == "right" for rank in lines[call]["ranks"].values()), lines[call]
