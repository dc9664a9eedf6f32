"""Ranks on two GPUs that wait in vain: `python -m pytest -m gpu tests/gpu/test_failures.py`."""

import os
import re
import subprocess
import sys

from gpu import failure_worker
from gpu.test_expert_parallel import needs_gpus
from jax_megamoe.primitives.moe_peers import TIMEOUT_VARIABLE

pytestmark = needs_gpus


def run_scenario(scenario: str) -> list[str]:
    """Runs it in a process whose own checks have to hold; returns what the package wrote to the standard error."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),  # tests and package from where this process has them
        TIMEOUT_VARIABLE: "5",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has the GPUs, too
    }
    command = [sys.executable, "-m", failure_worker.__name__, scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return re.findall(r"^jax_megamoe: (.*?):", done.stderr, re.MULTILINE)


def test_a_replayed_graph_whose_peer_is_gone():
    """No handler could raise an error; the process gets NaN, says why, once, and lives."""
    epoch = 1 + failure_worker.COMMON + 1
    assert run_scenario("replayed_graph") == [f"rank 0 waited in vain for rank 1, phase routing, epoch {epoch}"]


def test_ranks_that_disagree_on_the_shape():
    """After three launches in which they agreed. Each may find out by itself, or be told by the other first."""
    told = run_scenario("other_shape")
    assert told
    assert set(told) <= {f"rank {r} waited in vain for rank {1 - r}, phase routing, epoch 4" for r in range(2)}
