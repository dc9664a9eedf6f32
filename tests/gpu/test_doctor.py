"""What `doctor` says of these GPUs, and that XLA captures loops by the flags that are recommended.

`python -m pytest -m gpu tests/gpu/test_doctor.py`, from one GPU up.
"""

import json
import os
import subprocess
import sys

import pytest

import jax_megamoe as mm
from jax_megamoe.doctor.check import LIMIT
from tests.support.skips import gpu_tests, gpus, why_no_group, why_no_hopper, why_no_kernel

pytestmark = gpu_tests(why_no_hopper() or why_no_kernel())


def run(*command: str, flags: str = "") -> "subprocess.CompletedProcess[str]":
    """A process of its own, beside this one on the same GPUs: no memory is set aside."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": flags}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_doctor():
    done = run("-m", "jax_megamoe", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    found, count = report["facts"], len(gpus())
    assert found["backend"] == "gpu" and found["module"].startswith("built with CUDA")
    assert "jax_megamoe.moe.v1" in found["ffi_targets"]
    together = count == 1 or why_no_group() is None
    assert report["implementation"] == ("cuda" if together else "collective")
    assert len(found["devices"]) == len(found["peer_access"]) == count
    for device in found["devices"]:
        (gpu,) = (gpu for gpu in found["gpus"] if gpu["bus_id"] == device["bus_id"])
        assert gpu["compute_capability"] == device["compute_capability"] == "9.0"
        assert 0 <= device["bytes_beside_xla"] < gpu["total_bytes"] and device["xla_bytes"] <= gpu["total_bytes"]
    assert report["check"]["num_devices"] == count and 1e-5 < report["check"]["difference"] <= LIMIT
    assert mm.recommended_xla_flags() in report["notes"][0]


LOOP = """
import jax, jax.numpy as jnp
import jax_megamoe as mm
from jax_megamoe import _core

normal = lambda n, *shape: jax.random.normal(jax.random.key(n), shape) / shape[-1] ** 0.5
weights = mm.quantize_experts(normal(0, 8, 256, 512), normal(1, 8, 256, 512), normal(2, 8, 512, 256))
x = normal(3, 4, 512).astype(jnp.bfloat16)
ids, topk_weights = mm.route(normal(4, 4, 8), top_k=2)

@jax.jit
def decode(x, weights, count):
    def step(state):
        return state[0] + 1, x + mm.moe(state[1], weights, ids, topk_weights)
    return jax.lax.while_loop(lambda state: state[0] < count, step, (0, x))[1]

for _ in range(3):
    before = _core.moe_execute_count()
    jax.block_until_ready(decode(x, weights, 16))
print(_core.moe_execute_count() - before)
"""


@pytest.mark.parametrize(("flags", "is_captured"), [("", False), (mm.recommended_xla_flags(), True)])
def test_the_flags_make_one_graph_of_a_loop(flags, is_captured):
    """A run that replays a graph calls no handler. Without the flags a body so small is none, and a hint names them."""
    done = run("-c", LOOP, flags=flags)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() == "0") == is_captured, done.stdout
    assert ("moe is called in jax.lax.while_loop" in done.stderr) == (not is_captured)
