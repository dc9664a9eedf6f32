"""The wires of expert parallelism on GPUs, from a group of one up: `python -m pytest -m gpu tests/gpu/test_peers.py`."""

import os
import re
import signal
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_megamoe.errors import MegaMoEError
from jax_megamoe.primitives import _library, wire_test
from jax_megamoe.primitives.wire_test import WireTest
from tests.support.meshes import mesh_of
from tests.support.skips import gpu_tests, gpus, unless, why_no_gpus

pytestmark = gpu_tests(why_no_gpus())
needs_two = unless(why_no_gpus(2))
EXPERT = ("expert",)


def make_mesh(devices: Any = None, **sizes: int) -> Mesh:
    """Of all GPUs along one axis, where nothing else is said."""
    return mesh_of(gpus() if devices is None else devices, sizes or {"expert": len(gpus())})


def run_command(*options: str) -> tuple[int, str, str]:
    """Exit status, output and errors of the command that tries the wires, in a process of its own or in one per GPU."""
    command = [sys.executable, "-m", "jax_megamoe.peers", *options]
    # It shares the GPUs with this process: no memory is set aside.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)
    try:
        output, errors = child.communicate(timeout=240)
    finally:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)  # with the processes that it has started
            child.wait()
    return child.returncode, output, errors


def run(mesh: Mesh, test: WireTest, launches: int = 1, axes: tuple[str, ...] = EXPERT) -> np.ndarray:
    rows = wire_test.run(mesh, axes, test, launches)
    wire_test.check_rows(rows, mesh, axes)
    return rows


def start(mesh: Mesh, test: WireTest, launches: int = 1) -> Any:
    """Runs a program and returns it: while it lives, so does its executable, and the memory with it."""
    program = wire_test.program(mesh, EXPERT, test, launches)
    wire_test.check_rows(wire_test.gather_rows(program()), mesh, EXPERT)
    return program


@pytest.mark.parametrize("num_bytes", [16, 4096, 1 << 20])
def test_pushes_arrive(num_bytes):
    rows = run(make_mesh(), WireTest(bytes=num_bytes), launches=3)
    assert (rows[..., wire_test.BYTES] == num_bytes).all()
    assert (np.diff(rows[..., wire_test.EPOCH], axis=0) == 1).all()


def test_many_launches_in_a_captured_program():
    mesh = make_mesh()
    for _ in range(5):
        run(mesh, WireTest(bytes=4096), launches=40)


def test_a_group_of_one_per_device():
    run(make_mesh(data=len(gpus()), expert=1), WireTest(bytes=4096), launches=3)


@needs_two
def test_order_of_devices():
    run(make_mesh(devices=gpus()[::-1], expert=len(gpus())), WireTest(bytes=4096), launches=3)


@pytest.mark.skipif(len(gpus()) < 4, reason=f"needs 4 GPUs; this process sees {len(gpus())}")
@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 2}, {"expert": 2, "model": 2}], ids=str)
def test_groups_in_a_larger_mesh(sizes):
    run(make_mesh(**sizes), WireTest(bytes=4096), launches=3)


@pytest.mark.skipif(len(gpus()) < 4, reason=f"needs 4 GPUs; this process sees {len(gpus())}")
def test_expert_axis_of_two_mesh_axes():
    run(make_mesh(a=2, b=2), WireTest(bytes=4096), launches=3, axes=("b", "a"))


@pytest.mark.parametrize("mode", [wire_test.ROUND_TRIP, wire_test.PUSH])
def test_modes_that_measure(mode):
    mesh = make_mesh()
    rows = run(mesh, WireTest(mode=mode, iterations=20), launches=3)
    assert (rows[..., wire_test.NANOSECONDS] > 0).any()
    run(mesh, WireTest())  # and checked pushes work after it


def test_programs_of_one_size_share_the_memory():
    mesh = make_mesh()
    test = WireTest(bytes=(1 << 20) + 16)
    alive = [start(mesh, test)]
    before = len(_library.symmetric_memories())
    assert before > 0
    alive.append(start(mesh, test, launches=2))  # another executable
    assert len(_library.symmetric_memories()) == before


def test_memory_is_given_back_with_the_executables():
    program = start(make_mesh(), WireTest(bytes=3 << 20))
    assert _library.symmetric_memories()
    del program
    jax.clear_caches()
    assert [m for m in _library.symmetric_memories() if not m["spans_processes"]] == []


# What the library says where nothing was tried, or where NCCL has registered nothing; all else is a failure.
NO_WINDOWS = re.compile(r"this NCCL, or this build, does not offer windows|NCCL registers no symmetric windows[^;).]*")


@pytest.mark.parametrize(
    "processes", [1, pytest.param(len(gpus()), marks=needs_two)], ids=["one process", "one process per GPU"]
)
def test_windows_where_they_are_offered(processes):
    # In processes of their own: a window is kept until its process ends.
    status, output, errors = run_command("--transport", "window", "--processes", str(processes), "--launches", "40")
    if status != 0 and (reason := NO_WINDOWS.search(errors)):
        pytest.skip(reason[0])
    assert status == 0, errors[-3000:]
    assert "transport: NCCL window" in output


@needs_two
def test_a_silent_rank_ends_in_an_error():
    # In a process of its own: what a rank leaves half done makes the buffer unusable.
    status, _, errors = run_command("--mute", "0")
    assert status == 1
    assert "phase flag: rank 0 did not come" in errors


@needs_two
def test_one_process_per_gpu():
    status, output, errors = run_command("--processes", str(len(gpus())), "--launches", "40")
    assert status == 0, errors[-3000:]
    assert "CUDA IPC" in output


def test_too_many_bytes_is_an_error():
    with pytest.raises((MegaMoEError, jax.errors.JaxRuntimeError), match="multiple of 16"):
        run(make_mesh(), WireTest(bytes=17))
