"""The kernel in one page is right, on a Hopper GPU: it compares itself with the host."""

import subprocess

from tests.support.skips import gpu_tests, why_no_hopper
from tests.support.teaching import compile_teaching

pytestmark = gpu_tests(why_no_hopper())


def test_it_computes_what_it_says(tmp_path):
    program, _ = compile_teaching(tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GB/s of weights" in done.stdout
