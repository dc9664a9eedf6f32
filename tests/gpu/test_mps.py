"""The layer under NVIDIA's multi-process service, with a share of a GPU's SMs: `pytest -m gpu tests/gpu/test_mps.py`.

Starts a daemon of its own, beside which other processes use the GPU as before.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.skips import gpu_tests, why_no_hopper, why_no_kernel

pytestmark = gpu_tests(why_no_hopper() or why_no_kernel())

CONTROL = "nvidia-cuda-mps-control"
# Few tokens (swapAB) and many (the normal orientation) against the reference, and how many SMs JAX sees.
LAYERS = """
import json
import jax, numpy as np
import jax_megamoe as mm
from tests.support.compare import bits, difference
from tests.support.problems import Sizes, make_problem

differences, same = [], True
for tokens in (1, 40, 640):
    problem = make_problem(tokens, Sizes(hidden=512, inter=384, num_experts=48, top_k=4), "masked")
    program = jax.jit(mm.moe)
    first = program(*problem)
    differences.append(difference(first, jax.jit(mm.reference.moe)(*problem)))
    same = same and all(np.array_equal(bits(program(*problem)), bits(first)) for _ in range(20))
print(json.dumps({"sms": jax.devices()[0].core_count, "differences": differences, "same": same}))
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of processes that use the daemon."""
    if shutil.which(CONTROL) is None:
        pytest.skip(f"needs {CONTROL}")
    folder = tmp_path_factory.mktemp("mps")
    names = {"CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "log")}
    environment = {**os.environ, **names}
    for path in names.values():
        os.mkdir(path)
    started = subprocess.run([CONTROL, "-d"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    if started.returncode:
        pytest.skip(f"{CONTROL} does not start here: {started.stdout}{started.stderr}")
    yield environment
    subprocess.run([CONTROL], input="quit -t 5\n", env=environment, text=True, timeout=60, check=False)


@pytest.mark.parametrize("percentage", [100, 30])
def test_a_share_of_the_sms(service, percentage):
    environment = {
        **service,
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percentage),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", LAYERS], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    if "MPS" in done.stderr and done.returncode:
        pytest.skip(f"the service does not serve here: {done.stderr[-500:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(found)
    assert found["same"] and max(found["differences"]) < 1e-4
