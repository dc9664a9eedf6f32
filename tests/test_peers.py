"""The wires between GPUs and the memory they take, as far as no GPU is needed: program, checks, command, planner."""

import datetime
import os
import re
import subprocess
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_megamoe import expert_parallel, peers, provenance
from jax_megamoe.errors import MegaMoEError, ShapeError
from jax_megamoe.primitives import _groups, _library, wire_test
from jax_megamoe.primitives.wire_test import WireTest
from tests.support.meshes import mesh_of


def make_mesh(**sizes: int) -> Mesh:
    return mesh_of(jax.devices("cpu"), sizes)


@pytest.mark.parametrize("sizes", [{"expert": 8}, {"data": 2, "expert": 4}, {"expert": 4, "model": 2}], ids=str)
def test_program_carries_the_groups(cuda_core, sizes):
    mesh = make_mesh(**sizes)
    jitted = wire_test.program(mesh, ("expert",), WireTest(bytes=4096, shift=1, mode=wire_test.PUSH), 2)
    text = jitted.trace().lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(\S+?)\(.*?mhlo.backend_config = \{(.*?)\}", text)
    assert [name for name, _ in calls] == ["jax_megamoe.wire_test.v1"] * 2
    groups = _groups.replica_groups(sizes, ("expert",))
    for _, attributes in calls:
        assert f"group_size = {groups.shape[1]} : i64" in attributes
        (ids,) = re.findall(r"replica_groups = dense<\[(.*?)\]> : tensor<\d+xi64>", attributes)
        assert [int(n) for n in ids.split(",")] == groups.ravel().tolist()
        assert "bytes = 4096 : i64" in attributes and "mode = 2 : i64" in attributes


@pytest.mark.parametrize("number", [-1, 0, 33, 100_000])
def test_so_many_processes_are_not_started(number, capsys, monkeypatch):
    monkeypatch.setattr(peers, "_launch", lambda *_: pytest.fail("started some"))
    with pytest.raises(SystemExit) as ended:
        peers.main(["--processes", str(number)])
    assert ended.value.code == 2 and f"--processes is {number}, wanted 1 to 32" in capsys.readouterr().err


def test_a_process_that_fails_ends_the_others(monkeypatch):
    code = "import os, sys, time; rank = int(os.environ['MEGAMOE_PEERS_PROCESS']); rank or time.sleep(100); sys.exit(3)"
    start = subprocess.Popen
    children = []

    def start_another(command, **options):
        children.append(start([sys.executable, "-c", code], **options))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", start_another)
    monkeypatch.setattr(peers, "_SECONDS_TO_SAY", 0.5)
    assert peers._launch(2, []) == 3
    assert children[0].wait(timeout=10) < 0, "rank 0 was to be ended"


DECODE = """
import jax, numpy as np
jax.devices("cpu")  # types of states are registered with a backend that exists
from jax_megamoe import _core
from jax_megamoe.primitives import wire_test
registrations = _core.ffi_registrations()
name = "jax_megamoe.wire_test_instance.v1"
jax.ffi.register_ffi_type(name, registrations["types"][name], platform="cpu")
name = "jax_megamoe.wire_test.v1"
jax.ffi.register_ffi_target(name, registrations["targets"][name], platform="cpu")
mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("expert",))
wire_test.program(mesh, ("expert",), wire_test.WireTest(), 1)()
"""


def test_handler_takes_the_call(cuda_core):
    """On a CPU nothing but the stream is missing: operands, results, state and attributes are decoded."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", DECODE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert "[execute]" in result.stderr and "(bad operands at: 0)" in result.stderr, result.stderr[-2000:]
    assert "Failed to get platform stream" in result.stderr


def good_rows(num_ranks: int = 2) -> np.ndarray:
    rows = np.zeros((1, num_ranks, num_ranks, 8), np.int64)
    rows[..., wire_test.EPOCH] = 7
    rows[..., wire_test.BYTES] = 4096
    rows[..., wire_test.AXIS_INDEX] = np.arange(num_ranks)[None, :, None]
    return rows


def test_rows_are_checked():
    mesh, rows = make_mesh(expert=2), good_rows()
    wire_test.check_rows(rows, mesh, ("expert",))
    rows[0, 1, 0, [wire_test.PHASE, wire_test.SEEN, wire_test.WANTED]] = 2, 6, 7
    with pytest.raises(
        MegaMoEError, match=r"rank 1 .*epoch 7, phase flag: rank 0 did not come, its flag is 6, wanted 7"
    ):
        wire_test.check_rows(rows, mesh, ("expert",))
    rows = good_rows()
    rows[0, 0, 1, wire_test.MISMATCHES] = 3
    with pytest.raises(MegaMoEError, match="3 of 512 words from rank 1 are wrong"):
        wire_test.check_rows(rows, mesh, ("expert",))
    rows = good_rows()
    rows[..., wire_test.AXIS_INDEX] = 0
    with pytest.raises(MegaMoEError, match="communicator's rank is 1 and jax.lax.axis_index is 0"):
        wire_test.check_rows(rows, mesh, ("expert",))


def test_command_needs_a_gpu(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert peers.main([]) == 1
    assert "sees no GPU" in capsys.readouterr().err


def test_no_memory_is_shared_without_a_call():
    if jax.default_backend() == "gpu":
        pytest.skip("other tests of the process may share some")
    assert _library.symmetric_memories() == []


def test_failures_are_those_of_the_buffers(monkeypatch):
    memories = [{"failure": ""}, {"failure": "rank 1 waited in vain for rank 0"}]
    fake = types.SimpleNamespace(has_cuda=True, symmetric_memories=lambda: memories)
    monkeypatch.setattr(_library, "_core", fake)
    assert expert_parallel.failures() == ["rank 1 waited in vain for rank 0"]
    monkeypatch.setattr(_library, "_core", None)
    assert expert_parallel.failures() == []


def test_what_a_result_file_says_of_the_machine(monkeypatch):
    about = provenance.describe()
    assert about["date"] == datetime.date.today().isoformat() and about["jax"] == jax.__version__
    assert about["device"] == jax.devices()[0].device_kind and isinstance(about["driver"], str)
    assert re.fullmatch("[0-9a-f]{7,40}|unknown", about["commit"])
    assert provenance.describe("abc")["commit"] == "abc"
    monkeypatch.setattr(provenance, "__file__", "/nowhere/provenance.py")
    assert provenance.describe()["commit"] == "unknown"


def test_commit_is_that_of_the_package(monkeypatch, tmp_path):
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-mc"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    file = tmp_path / "provenance.py"
    file.touch()
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.describe()["commit"] == "unknown"  # a copy inside the checkout of something else
    subprocess.run(["git", "-C", str(tmp_path), "add", "provenance.py"], check=True)
    assert re.fullmatch("[0-9a-f]{7,40}", provenance.describe()["commit"])


def test_several_drivers(monkeypatch):
    monkeypatch.setattr(provenance, "_output", lambda *command: "580.1\n580.1\n580.2")
    assert provenance._driver() == "580.1, 580.2"


def test_buffer_bytes(monkeypatch):
    def fake(factor: int) -> Any:
        return lambda *sizes: factor * sum(size for size in sizes if size != "fp8_block")

    monkeypatch.setattr(
        _library, "_core", types.SimpleNamespace(peer_buffer_bytes=fake(2), peer_workspace_bytes=fake(1))
    )
    found = expert_parallel.buffer_bytes(8, 6, 4096, 2048, 256, 8)
    assert found == (2 * found.scratch, 8 + 6 + 4096 + 2048 + 32 + False + 8) and found.symmetric == found[0]
    with pytest.raises(ShapeError, match="num_experts is 256 and num_ranks 6, wanted a multiple"):
        expert_parallel.buffer_bytes(8, 6, 4096, 2048, 256, 6)
    with pytest.raises(ShapeError, match="num_ranks is 0, wanted a positive int32"):
        expert_parallel.buffer_bytes(8, 6, 4096, 2048, 256, 0)
    monkeypatch.setattr(_library, "_core", types.SimpleNamespace())
    with pytest.raises(MegaMoEError, match="_core has no peer_buffer_bytes, wanted a build of the same version"):
        expert_parallel.buffer_bytes(8, 6, 4096, 2048, 256, 8)
    monkeypatch.setattr(_library, "_core", None)
    with pytest.raises(MegaMoEError, match="_core is not built"):
        expert_parallel.buffer_bytes(8, 6, 4096, 2048, 256, 8)


def test_buffer_bytes_of_this_build():
    core: Any = _library._core
    if not hasattr(core, "peer_buffer_bytes"):
        pytest.skip("jax_megamoe._core has no peer_buffer_bytes")
    found = expert_parallel.buffer_bytes(128, 6, 7168, 3072, 384, 8)
    # At the least, each other rank's tokens in FP8.
    assert found.symmetric >= 7 * 128 * 7168 and found.scratch > 0
    with pytest.raises(MegaMoEError, match="format is 'int4', wanted one of"):
        expert_parallel.buffer_bytes(128, 6, 7168, 3072, 384, 8, format="int4")
    larger = expert_parallel.buffer_bytes(256, 6, 7168, 3072, 384, 8)
    assert larger.symmetric > found.symmetric
    assert expert_parallel.buffer_bytes(128, 6, 7168 - 1, 3072 - 100, 384, 8) == found
    for hidden_size in (0, -128, 65536 + 1):
        with pytest.raises(ValueError):
            expert_parallel.buffer_bytes(128, 6, hidden_size, 3072, 384, 8)
    with pytest.raises(ValueError):
        expert_parallel.buffer_bytes(128, 33, 7168, 3072, 384, 8)


@pytest.mark.parametrize(
    ("model", "most"), [((4096, 2048, 256), 0.9e9), ((7168, 3072, 384), 1.3e9)], ids=["flash", "pro"]
)
def test_memory_of_large_batches(model, most):
    """8192 tokens on each of eight ranks: images of tokens and of activations go through rings."""
    core: Any = _library._core
    if not hasattr(core, "peer_buffer_bytes"):
        pytest.skip("jax_megamoe._core has no peer_buffer_bytes")
    hidden, inter, experts = model
    found = expert_parallel.buffer_bytes(8192, 6, hidden, inter, experts, 8)
    assert found.symmetric + found.scratch <= most
