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
from tests.support.skips import gpu_tests, gpus, why_no_gpus, why_no_group, why_no_hopper, why_no_kernel

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


# On as many devices as the argument says: whether a while_loop gives the bits of layers that are unrolled, three times,
# and how often the last run called the handler of one device.
LOOP = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jax_megamoe as mm
from jax_megamoe import _core

ranks, steps = int(sys.argv[1]), 16
normal = lambda n, *shape: jax.random.normal(jax.random.key(n), shape) / shape[-1] ** 0.5
weights = mm.quantize_experts(normal(0, 8, 256, 512), normal(1, 8, 256, 512), normal(2, 8, 512, 256))
x = (20 * normal(3, 8, 512)).astype(jnp.bfloat16)
arguments = (x, weights, *mm.route(normal(4, 8, 8), top_k=2))
mesh = Mesh(np.array(jax.devices()[:ranks]), ("expert",))
if ranks > 1:
    arguments = jax.device_put(arguments, NamedSharding(mesh, P("expert")))

def layer(y, x, weights, ids, topk_weights):
    # Else what XLA makes of the two programs may round in other places.
    y = jax.lax.optimization_barrier(mm.moe(y, weights, ids, topk_weights))
    return jax.lax.optimization_barrier(x + y)

def unrolled(x, *others):
    y = x
    for _ in range(steps):
        y = layer(y, x, *others)
    return y

def loop(count, x, *others):
    return jax.lax.while_loop(lambda s: s[0] < count, lambda s: (s[0] + 1, layer(s[1], x, *others)), (0, x))[1]

with jax.set_mesh(mesh if ranks > 1 else Mesh(np.empty((), object), ())):
    wanted, decode = np.asarray(jax.jit(unrolled)(*arguments)), jax.jit(loop)
    for _ in range(3):
        before = _core.moe_execute_count()
        found = np.asarray(decode(jnp.int32(steps), *arguments))
        assert found.tobytes() == wanted.tobytes() and np.any(found != np.asarray(x)), (found, wanted)
print(_core.moe_execute_count() - before)
"""


@pytest.mark.parametrize(("flags", "is_captured"), [("", False), (mm.recommended_xla_flags(), True)])
def test_the_flags_make_one_graph_of_a_loop(flags, is_captured):
    """A run that replays a graph calls no handler. Without the flags a body so small is none, and a hint names them."""
    done = run("-c", LOOP, "1", flags=flags)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() == "0") == is_captured, done.stdout
    assert ("moe is called in jax.lax.while_loop" in done.stderr) == (not is_captured)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_group_in_a_loop_with_the_flags(num_ranks):
    if reason := why_no_gpus(num_ranks):
        pytest.skip(reason)
    done = run("-c", LOOP, str(num_ranks), flags=mm.recommended_xla_flags())
    assert done.returncode == 0, done.stderr
