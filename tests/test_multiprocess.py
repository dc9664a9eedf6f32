"""Several processes under `jax.distributed` on CPU devices: the layer's results, their bits, and the demo's texts are those of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import multiprocess_worker
from tests.multiprocess_worker import CASES, NUM_DEVICES, run_case, run_demo
from tests.support.cases import exhaustive
from tests.support.expert_layer import assert_matches_model, make_layer
from tests.support.skips import unless, why_no_host_devices

TIME_LIMIT = 100

pytestmark = unless(why_no_host_devices(NUM_DEVICES))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def run_processes(processes: int, folder: Path) -> None:
    number = "--xla_force_host_platform_device_count="
    others = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(number)]
    flags = " ".join([*others, f"{number}{NUM_DEVICES // processes}"])  # bits are compared: programs are made alike
    folders = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": folders, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    port = free_port()
    logs = [folder / f"{process}.log" for process in range(processes)]
    children = []
    for process, log in enumerate(logs):
        with log.open("w") as output:
            command = [
                sys.executable,
                "-m",
                multiprocess_worker.__name__,
                str(processes),
                str(process),
                str(port),
                str(folder),
            ]
            children.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        statuses = [child.wait(timeout=TIME_LIMIT) for child in children]
    finally:
        for child in children:
            child.kill()
    assert statuses == [0] * processes, "\n".join(log.read_text()[-2000:] for log in logs)


def put_together(folder: Path, name: str, what: str) -> np.ndarray:
    parts: dict[int, np.ndarray] = {}
    for path in sorted(folder.glob(f"{name}.{what}.*.npy")):
        first, part = int(path.name.split(".")[2]), np.load(path)
        # Copies on other devices, of other processes too, have the same bits.
        np.testing.assert_array_equal(parts.setdefault(first, part), part)
    return np.concatenate([parts[first] for first in sorted(parts)])


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return {name: run_case(case, jax.devices("cpu")[:NUM_DEVICES]) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def texts_of_one_process() -> list[str]:
    return run_demo(jax.devices("cpu")[:NUM_DEVICES])


@pytest.mark.parametrize("processes", [2, exhaustive(4)])
def test_processes_give_the_result_of_one(processes, one_process, texts_of_one_process, tmp_path):
    run_processes(processes, tmp_path)
    for process in range(processes):
        assert json.loads((tmp_path / f"demo.{process}.json").read_text()) == texts_of_one_process
    layer = make_layer()
    for name, (y, load) in one_process.items():
        bits = put_together(tmp_path, name, "y")
        assert_matches_model(jnp.asarray(bits).view(jnp.bfloat16), layer)
        np.testing.assert_array_equal(put_together(tmp_path, name, "load"), layer.load)
        np.testing.assert_array_equal(load, layer.load)
        if name != "replicated":
            # Additions in the order of the ranks, wherever these are; replicated tokens are left to XLA's all-reduce.
            np.testing.assert_array_equal(bits, np.asarray(y).view(np.uint16))
