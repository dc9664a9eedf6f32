"""A short soak on the GPUs; the long one is a command, `python -m tests.soak` (docs/reliability.md)."""

import os
import subprocess
import sys

import pytest

from tests.support.skips import gpu_tests, gpus, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())


@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_seconds(ranks):
    if len(gpus()) < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    command = [sys.executable, "-m", "tests.soak", "--seconds", "20", "--seed", str(ranks), "--ranks", str(ranks)]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
