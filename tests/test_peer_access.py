"""Why collectives are chosen for an expert axis: over devices and facts that are made up."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jax_megamoe.primitives import _compat, _peers


class Device(NamedTuple):
    process_index: int
    local_hardware_id: int


@pytest.fixture
def ask(monkeypatch):
    """ask(sizes, devices, facts by process) -> the reason."""

    def reason(sizes: dict[str, int], devices: list[Device], facts: dict[int, dict[str, Any]]) -> str | None:
        monkeypatch.setattr(_peers, "_devices_of_mesh", lambda size: devices[:size])
        monkeypatch.setattr(_peers, "_facts_of", lambda processes: [facts[p] for p in processes])
        _peers._reason.cache_clear()
        return _peers.reason_for_collectives(sizes, ("expert",))

    yield reason
    _peers._reason.cache_clear()


def host(name: str, unreachable: Any = None) -> dict[str, Any]:
    return {"host": f"boot of {name}", "name": name, "unreachable": unreachable}


ONE_PROCESS = [Device(0, n) for n in range(4)]
PROCESS_EACH = [Device(n, n) for n in range(4)]


def test_one_host_with_access(ask):
    assert ask({"expert": 4}, ONE_PROCESS, {0: host("a")}) is None
    assert ask({"expert": 4}, PROCESS_EACH, dict.fromkeys(range(4), host("a"))) is None


def test_groups_on_one_host_each(ask):
    facts = {0: host("a"), 1: host("a"), 2: host("b"), 3: host("b")}
    assert ask({"data": 2, "expert": 2}, PROCESS_EACH, facts) is None


def test_group_over_two_hosts(ask):
    facts = {0: host("a"), 1: host("a"), 2: host("b"), 3: host("b")}
    reason = ask({"expert": 2, "model": 2}, PROCESS_EACH, facts)
    assert reason == "the 2 ranks of an expert group are on 2 hosts (a, b)"


def test_no_access_on_one_process(ask):
    reason = ask({"expert": 4}, ONE_PROCESS, {0: host("a", (1, 3))})
    assert reason == "GPU 1 of process 0 has no access to the memory of GPU 3"


def test_one_rank_needs_no_access(ask):
    assert ask({"data": 4, "expert": 1}, ONE_PROCESS, {0: host("a", (1, 3))}) is None


def test_a_mesh_for_another_machine_says_nothing():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has GPUs")
    assert _peers.reason_for_collectives({"expert": 4}, ("expert",)) is None


def test_facts_of_one_process_are_its_own():
    assert _compat.share_between_processes("key", "value", [0], 1) == ["value"]
    assert np.array(jax.process_index()) == 0
