"""One symmetric buffer serves all sizes of batch of a group: `python -m pytest -m gpu -s tests/gpu/test_buffers.py`."""

import pytest

from tests.gpu import buffers_worker
from tests.support import processes
from tests.support.skips import gpu_tests, gpus, why_no_group

pytestmark = gpu_tests(why_no_group())

MIB = 1 << 20


@pytest.mark.parametrize(
    ("layout", "order"),
    [("one process", "ascending"), ("one process", "descending"), ("a process for each GPU", "ascending")],
)
def test_buckets_share_one_buffer(layout: str, order: str) -> None:
    number = 1 if layout == "one process" else len(gpus())
    outcomes = processes.run(buffers_worker.__name__, order, processes=number, limit=110, share=0.15)
    processes.check_ended(outcomes)
    for outcome in outcomes:
        largest, local_devices = (outcome.lines[0][key] for key in ("largest_bytes", "local_devices"))
        for line in outcome.lines[1:]:
            assert line.get("outcome", "right") == "right", line
        states = [line for line in outcome.lines if "when" in line and line["when"] != "before"]
        for line in states:
            assert len(set(line["devices"])) == len(line["devices"]) == local_devices, (
                f"one buffer for each GPU: {line}"
            )
            assert max(line["bytes"]) <= 1.15 * largest, line
        assert min(states[-1]["bytes"]) >= largest
        small, end = states[0]["used"], states[-1]["used"]
        if small is not None:
            grown = max(after - before for before, after in zip(small, end, strict=True))
            assert grown * MIB <= 1.15 * largest + 300 * MIB, f"{grown} MiB more than after the smallest bucket"
