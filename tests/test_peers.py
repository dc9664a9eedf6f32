"""The probe of the wires between GPUs, as far as no GPU is needed: its program, its checks, its command."""

import os
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_megamoe import peers
from jax_megamoe.errors import MegaMoEError
from jax_megamoe.primitives import _groups, _library, peer_probe
from jax_megamoe.primitives.peer_probe import Probe


def make_mesh(**sizes: int) -> Mesh:
    return Mesh(
        np.array(jax.devices("cpu")[: int(np.prod(list(sizes.values())))]).reshape(*sizes.values()), tuple(sizes)
    )


@pytest.fixture
def core() -> Any:
    if _library._core is None or not _library._core.has_cuda:
        pytest.skip("jax_megamoe._core is built without CUDA")
    return _library._core


@pytest.mark.parametrize("sizes", [{"expert": 8}, {"data": 2, "expert": 4}, {"expert": 4, "model": 2}], ids=str)
def test_program_carries_the_groups(core, sizes):
    mesh = make_mesh(**sizes)
    jitted = peer_probe.program(mesh, ("expert",), Probe(bytes=4096, shift=1, mode=peer_probe.PUSH), 2)
    text = jitted.trace().lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(\S+?)\(.*?mhlo.backend_config = \{(.*?)\}", text)
    assert [name for name, _ in calls] == ["jax_megamoe.peer_probe.v1"] * 2
    groups = _groups.replica_groups(sizes, ("expert",))
    for _, attributes in calls:
        assert f"group_size = {groups.shape[1]} : i64" in attributes
        (ids,) = re.findall(r"replica_groups = dense<\[(.*?)\]> : tensor<\d+xi64>", attributes)
        assert [int(n) for n in ids.split(",")] == groups.ravel().tolist()
        assert "bytes = 4096 : i64" in attributes and "mode = 2 : i64" in attributes


DECODE = """
import jax, numpy as np
jax.devices("cpu")  # types of states are registered with a backend that exists
from jax_megamoe import _core
from jax_megamoe.primitives import peer_probe
registrations = _core.ffi_registrations()
name = "jax_megamoe.peer_probe_instance.v1"
jax.ffi.register_ffi_type(name, registrations["types"][name], platform="cpu")
name = "jax_megamoe.peer_probe.v1"
jax.ffi.register_ffi_target(name, registrations["targets"][name], platform="cpu")
mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("expert",))
peer_probe.program(mesh, ("expert",), peer_probe.Probe(), 1)()
"""


def test_handler_takes_the_call(core):
    """On a CPU nothing but the stream is missing: operands, results, state and attributes are decoded."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", DECODE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert "[execute]" in result.stderr and "(bad operands at: 0)" in result.stderr, result.stderr[-2000:]
    assert "Failed to get platform stream" in result.stderr


def good_rows(num_ranks: int = 2) -> np.ndarray:
    rows = np.zeros((1, num_ranks, num_ranks, 8), np.int64)
    rows[..., peer_probe.EPOCH] = 7
    rows[..., peer_probe.BYTES] = 4096
    rows[..., peer_probe.AXIS_INDEX] = np.arange(num_ranks)[None, :, None]
    return rows


def test_rows_are_checked():
    mesh, rows = make_mesh(expert=2), good_rows()
    peer_probe.check_rows(rows, mesh, ("expert",))
    rows[0, 1, 0, [peer_probe.PHASE, peer_probe.SEEN, peer_probe.WANTED]] = 2, 6, 7
    with pytest.raises(
        MegaMoEError, match=r"rank 1 .*epoch 7, phase flag: rank 0 did not come, its flag is 6, wanted 7"
    ):
        peer_probe.check_rows(rows, mesh, ("expert",))
    rows = good_rows()
    rows[0, 0, 1, peer_probe.MISMATCHES] = 3
    with pytest.raises(MegaMoEError, match="3 of 512 words from rank 1 are wrong"):
        peer_probe.check_rows(rows, mesh, ("expert",))
    rows = good_rows()
    rows[..., peer_probe.AXIS_INDEX] = 0
    with pytest.raises(MegaMoEError, match="communicator's rank is 1 and jax.lax.axis_index is 0"):
        peer_probe.check_rows(rows, mesh, ("expert",))


def test_command_needs_a_gpu(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert peers.main([]) == 1
    assert "sees no GPU" in capsys.readouterr().err


def test_no_memory_is_shared_without_a_call():
    if jax.default_backend() == "gpu":
        pytest.skip("other tests of the process may share some")
    assert _library.symmetric_memories() == []
