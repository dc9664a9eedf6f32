"""Why collectives are chosen for an expert axis: over devices and facts that are made up."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe import _compat
from jax_megamoe.errors import GroupError
from jax_megamoe.primitives import _gpus, _library, _reachability, moe_peers
from jax_megamoe.primitives._reachability import Place
from tests.support.cuda_lowering import FUSED, LOCAL, calls, cuda_text
from tests.support.expert_layer import make_layer
from tests.support.meshes import mesh_of, place_all
from tests.support.skips import unless, why_no_host_devices

pytestmark = unless(why_no_host_devices())


class Job:
    """The CPU devices of this process as GPUs of a job, with the place of each, and what its processes tell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: set[int] = set()
        self.facts: dict[int, dict[str, Any]] = {}
        self.devices = jax.devices("cpu")[:8]
        self._places: list[Place] = []
        monkeypatch.setattr(_reachability, "_gpus_of_job", lambda: self.devices[: len(self._places)])
        monkeypatch.setattr(_reachability, "_place", lambda device: self._places[self.devices.index(device)])
        monkeypatch.setattr(_reachability, "_facts_of", self._facts_of)
        _reachability._reason.cache_clear()

    def _facts_of(self, processes: list[int]) -> list[dict[str, Any]]:
        self.asked.update(processes)
        return [self.facts[p] for p in processes]

    def place(self, hosts: str, gpus_per_process: int, namespaces: str = "", unreachable: Any = ()) -> None:
        """A letter of `hosts`, and of `namespaces`, for each process."""
        self._places = [Place(p, n) for p in range(len(hosts)) for n in range(gpus_per_process)]
        for p, (host, namespace) in enumerate(zip(hosts, namespaces or "x" * len(hosts), strict=True)):
            gpus = {str(n): f"{p}:{n}" for n in range(gpus_per_process)}
            pairs = [pair for pair in unreachable if pair[0] in gpus.values()]
            names = {"host": f"boot of {host}", "name": host, "ipc": namespace}
            self.facts[p] = {**names, "gpus": gpus, "unreachable": pairs}

    def ask(self, devices: list[Any] | None, **sizes: int) -> str | None:
        _reachability._reason.cache_clear()
        self.asked.clear()
        return _reachability.reason_for_collectives(devices, sizes, ("expert",))


@pytest.fixture
def job(monkeypatch):
    yield Job(monkeypatch)
    _reachability._reason.cache_clear()


# Devices that are known.


def test_one_host(job):
    job.place("a", 4)
    assert job.ask(job.devices[:4], expert=4) is None
    job.place("aaaa", 1)
    assert job.ask(job.devices[:4], expert=4) is None


def test_groups_on_one_host_each(job):
    job.place("aabb", 1)
    assert job.ask(job.devices[:4], data=2, expert=2) is None
    # Not in the order of the processes.
    assert job.ask([job.devices[n] for n in (0, 2, 1, 3)], expert=2, model=2) is None


def test_group_over_two_hosts(job):
    job.place("aabb", 1)
    wanted = "the 2 ranks of an expert group are on 2 hosts (a, b)"
    assert job.ask(job.devices[:4], expert=2, model=2) == wanted
    assert job.ask([job.devices[n] for n in (0, 2, 1, 3)], data=2, expert=2) == wanted


def test_only_processes_of_the_program_are_asked(job):
    job.place("aabb", 2)
    assert job.ask(job.devices[4:8], expert=4) is None and job.asked == {2, 3}
    assert "on 2 hosts" in job.ask(job.devices[2:6], expert=4) and job.asked == {1, 2}


def test_ipc_namespaces(job):
    job.place("aa", 2, namespaces="xy")
    wanted = "the 4 ranks of an expert group are in 2 IPC namespaces, as containers have them"
    assert job.ask(job.devices[:4], expert=4) == wanted
    assert job.ask(job.devices[:4], data=2, expert=2) is None


def test_no_access(job):
    job.place("a", 4, unreachable=[("0:1", "0:3")])
    wanted = "GPU 1 of process 0 has no access to the memory of GPU 3 of process 0"
    assert job.ask(job.devices[:4], expert=4) == wanted
    assert job.ask(job.devices[:4], data=2, expert=2) is None
    assert job.ask([job.devices[n] for n in (0, 2, 1, 3)], data=2, expert=2) == wanted
    job.place("aa", 1, unreachable=[("1:0", "0:0"), ("0:0", "elsewhere")])
    wanted = "GPU 0 of process 1 has no access to the memory of GPU 0 of process 0"
    assert job.ask(job.devices[:2], expert=2) == wanted


def test_one_rank_needs_no_access(job):
    job.place("ab", 2, unreachable=[("0:0", "0:1")])
    assert job.ask(job.devices[:4], data=4, expert=1) is None and not job.asked


def test_devices_of_another_machine_say_nothing(job):
    job.place("ab", 1)
    assert job.ask(job.devices[4:8], expert=4) is None and not job.asked


# Devices that are not known.

UNKNOWN = "which GPU has which rank is known inside jax.set_mesh(mesh) only, and "


def test_order_without_influence(job):
    job.place("aa", 4)
    assert job.ask(None, expert=8) is None
    job.place("a", 8)
    assert job.ask(None, data=2, expert=2) is None


def test_order_with_influence(job):
    job.place("aabb", 2)
    assert job.ask(None, data=2, expert=4) == UNKNOWN + "the 8 GPUs are on 2 hosts (a, b)"
    job.place("a", 4, unreachable=[("0:1", "0:3")])
    pair = "GPU 1 of process 0 has no access to the memory of GPU 3 of process 0"
    assert job.ask(None, data=2, expert=2) == UNKNOWN + pair


def test_processes_without_a_part_are_not_waited_for(job):
    job.place("aa", 4)
    assert job.ask(None, expert=4) == UNKNOWN + "the mesh has 4 of 8" and not job.asked


def test_more_devices_than_the_job_has(job):
    job.place("ab", 1)
    assert job.ask(None, expert=4) is None and not job.asked


def test_no_gpu_says_nothing():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has GPUs")
    for devices in (None, jax.devices("cpu")[:4]):
        assert _reachability.reason_for_collectives(devices, {"expert": 4}, ("expert",)) is None


# Programs.


def without_set_mesh(mesh: Mesh) -> list[str]:
    return calls(cuda_text(mm.moe, *place_all(mesh, make_layer())))


def in_shard_map(mesh: Mesh, manual: tuple[str, ...] = ("data", "expert")) -> list[str]:
    experts = P("expert") if "expert" in manual else P()
    specs: Any = {"in_specs": (P(manual), experts, P(manual), P(manual)), "out_specs": P(manual)}
    function = jax.shard_map(mm.moe, mesh=mesh, axis_names=set(manual), **specs)
    return calls(cuda_text(function, *place_all(mesh, make_layer())))


def in_partly_manual_shard_map(mesh: Mesh) -> list[str]:
    return in_shard_map(mesh, ("data",))


def with_set_mesh(way: Callable[[Mesh], list[str]]) -> Callable[[Mesh], list[str]]:
    def inside(mesh: Mesh) -> list[str]:
        with jax.set_mesh(mesh):
            return way(mesh)

    return inside


WAYS = {
    "set_mesh": with_set_mesh(without_set_mesh),
    "shard_map": in_shard_map,
    "partly manual shard_map and set_mesh": with_set_mesh(in_partly_manual_shard_map),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@each_way
def test_the_order_in_the_mesh_decides(job, way, kind):
    """Two hosts with four GPUs each."""
    job.place("ab", 4)
    by_host, across = np.array(job.devices).reshape(2, 4), np.array(job.devices).reshape(4, 2).T
    assert way(mesh_of(by_host, {"data": 2, "expert": 4}, kind)) == [FUSED]
    assert way(mesh_of(by_host.T, {"expert": 4, "data": 2}, kind)) == [FUSED]
    assert way(mesh_of(across, {"data": 2, "expert": 4}, kind)) == [LOCAL]
    assert way(mesh_of(across.T, {"expert": 4, "data": 2}, kind)) == [LOCAL]


@pytest.mark.usefixtures("built")
@each_way
def test_a_mesh_over_a_part_of_the_devices(job, way):
    job.place("ab", 4)
    assert way(mesh_of(job.devices[4:], {"data": 2, "expert": 2})) == [FUSED] and job.asked == {1}
    assert way(mesh_of(job.devices[2:6], {"data": 1, "expert": 4})) == [LOCAL] and job.asked == {0, 1}


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("way", [without_set_mesh, in_partly_manual_shard_map])
def test_without_set_mesh(job, way, caplog):
    """JAX lowers such a program once for all meshes of a shape: where their devices matter, the kernel is not taken."""
    mesh = mesh_of(job.devices, {"data": 2, "expert": 4})
    job.place("aa", 4)
    assert way(mesh) == [FUSED]
    job.place("ab", 4)
    _reachability._reason.cache_clear()
    moe_peers._log_once.cache_clear()
    assert way(mesh) == [LOCAL]
    assert UNKNOWN in caplog.records[-1].message


@pytest.mark.usefixtures("built")
def test_an_abstract_mesh_in_a_job(job):
    job.place("ab", 4)
    mesh = AbstractMesh((4, 4), ("data", "expert"), axis_types=(AxisType.Explicit,) * 2)
    layer = make_layer()

    def typed(value: Any, *spec: Any) -> Any:
        sharding = jax.NamedSharding(mesh, P(*spec))
        return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), value)

    tokens = ("data", "expert")
    arguments = (typed(v, s) for v, s in zip(layer[:4], (tokens, "expert", tokens, tokens), strict=True))
    assert calls(cuda_text(mm.moe, *arguments)) == [FUSED] and not job.asked


# Facts.


def test_facts_of_one_process_are_its_own():
    assert _compat.share_between_processes("key", "value", [0], 1) == ["value"]
    assert np.array(jax.process_index()) == 0


def test_a_process_that_does_not_tell(monkeypatch):
    """It died before it lowered the program: the others say who is missing, in a sentence."""

    def wait(*arguments: Any) -> list[str]:
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out\nand more")

    monkeypatch.setattr(_reachability, "_own_facts", dict)
    monkeypatch.setattr(_compat, "share_between_processes", wait)
    wanted = (
        r"a process of 0, 3 has not told of its GPUs \(DEADLINE_EXCEEDED: [^\n]*\), wanted [^\n]* within 300 s: see "
    )
    with pytest.raises(GroupError, match=wanted):
        _reachability._facts_of([0, 3])


@pytest.fixture
def own_facts(monkeypatch):
    """own_facts(bus ids that CUDA shows, pairs of ordinals without access) of a process that computes on GPUs 1 and 2."""

    def facts(bus_ids: list[str], refused: list[tuple[int, int]]) -> dict[str, Any]:
        devices = [type("Device", (), {"local_hardware_id": n, "id": 10 + n}) for n in (1, 2)]
        monkeypatch.setattr(jax, "local_devices", lambda backend: devices)
        monkeypatch.setattr(_gpus, "bus_ids", lambda: bus_ids)
        monkeypatch.setattr(_gpus, "unreachable", lambda own, visible: [(min(own), "hidden")])
        monkeypatch.setattr(_library, "can_access_peer", lambda *pair: pair not in refused)
        return _reachability._own_facts.__wrapped__()

    return facts


def test_places_of_other_processes_need_no_number_that_only_those_know():
    """JAX gives `local_hardware_id` for a process's own devices only."""
    device = type("Device", (), {"process_index": 1, "id": 5, "local_hardware_id": None})()
    assert _reachability._place(device) == _reachability.Place(1, 5)


def test_own_facts(own_facts):
    facts = own_facts(["a", "b", "c", "d"], [(1, 3), (0, 1)])
    assert facts["gpus"] == {11: "b", 12: "c"}
    assert facts["unreachable"] == [("b", "d"), ("b", "hidden")]
    assert facts["host"] == _library.host_identity()


def test_own_facts_without_bus_ids(own_facts):
    facts = own_facts([], [(1, 2), (2, 1)])
    assert facts["gpus"] == {11: "device 11", 12: "device 12"}
    assert facts["unreachable"] == [
        ("device 11", "device 12"),
        ("device 12", "device 11"),
        ("device 11", "hidden"),
    ]


def test_host_identity(monkeypatch):
    assert _library.host_identity() == _library.host_identity() != ""
    core = type("Core", (), {"host_identity": staticmethod(lambda: "as the set-up sees it")})
    monkeypatch.setattr(_library, "_core", core)
    assert _library.host_identity() == "as the set-up sees it"


class Nvml:
    """Four GPUs; number 3 belongs to another container, and 0 can read but not write the memory of 2."""

    def __init__(self) -> None:
        self.is_open = 0

    def nvmlInit_v2(self) -> int:  # noqa: N802
        self.is_open += 1
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.is_open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 4
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 100 + index
        return 4 if index == 3 else 0

    def nvmlDeviceGetPciInfo_v3(self, handle: Any, info: Any) -> int:  # noqa: N802
        info._obj.bus = 0xA0 + handle.value - 100
        return 0

    def nvmlDeviceGetP2PStatus(self, one: Any, other: Any, access: int, status: Any) -> int:  # noqa: N802
        status._obj.value = 1 if {one.value, other.value} == {100, 102} and access == 1 else 0
        return 0


def test_the_management_library_knows_hidden_gpus(monkeypatch):
    nvml = Nvml()
    monkeypatch.setattr(_gpus, "_load", lambda name: nvml)
    zero, one, two = "0000:a0:00.0", "0000:a1:00.0", "0000:a2:00.0"
    assert _gpus.unreachable({zero}, {zero}) == [(zero, two)]
    assert _gpus.unreachable({zero}, {zero, two}) == []  # which CUDA knows better
    assert _gpus.unreachable({one}, {one}) == []
    assert _gpus.unreachable({"elsewhere"}, set()) == []
    assert nvml.is_open == 0


def test_no_driver(monkeypatch):
    monkeypatch.setattr(_gpus, "_load", lambda name: None)
    assert _gpus.bus_ids() == [] and _gpus.unreachable({"a"}, set()) == []
    monkeypatch.undo()
    assert _gpus._load("libno-such-library.so.1") is None
