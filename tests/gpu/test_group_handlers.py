"""Hostile programs on two GPUs: calls of the group handlers that do not fit are refused, and the next call is right.

In a process of its own, which ends at a limit: `python -m pytest -m gpu tests/gpu/test_group_handlers.py`.
"""

from typing import Any

import pytest

from tests.gpu import group_handlers_worker
from tests.support import hostile_calls, processes
from tests.support.skips import gpu_tests, why_no_group

pytestmark = gpu_tests(why_no_group())


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    environment = {"JAX_MEGAMOE_TIMEOUT_SECONDS": "5", "JAX_MEGAMOE_SETUP_TIMEOUT_SECONDS": "20"}
    outcomes = processes.run(group_handlers_worker.__name__, limit=200, share=0.03, environment=environment)
    processes.check_ended(outcomes)
    return outcomes[0].lines


@pytest.mark.parametrize("name", hostile_calls.HOSTILE_OF_GROUPS)
def test_a_hostile_call_is_refused(lines, name):
    (hostile,) = [line for line in lines if line.get("hostile") == name]
    assert hostile["found"] != "launched"
    assert hostile["seconds"] < 30, "with compiling and a set-up"
    (after,) = [line for line in lines if line.get("call") == name]
    assert after["error"] is None and after["failures"] == []
    assert all(rank["outcome"] == "right" for rank in after["ranks"].values()), after
