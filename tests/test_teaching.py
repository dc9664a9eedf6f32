"""The kernel in one page, examples/teaching/swap_ab.cu: it compiles without spills, and on a Hopper GPU it is right."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.skips import gpu_tests, why_no_hopper

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "examples" / "teaching" / "swap_ab.cu"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, str]:
    """The program, compiled as its first lines say, and what ptxas reports."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs an nvcc on PATH")
    command = next(line for line in SOURCE.read_text().splitlines() if line.startswith("//   nvcc "))
    program = tmp_path_factory.mktemp("teaching") / "swap_ab"
    arguments = command.removeprefix("//   nvcc ").split()
    arguments[arguments.index("-o") + 1] = str(program)
    done = subprocess.run(
        [nvcc, "-Xptxas", "-v", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return program, done.stderr + done.stdout


def test_it_compiles_without_spills(compiled):
    program, report = compiled
    assert program.exists()
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report


class TestOnAGpu:
    pytestmark = gpu_tests(why_no_hopper())

    def test_it_computes_what_it_says(self, compiled):
        done = subprocess.run([compiled[0]], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "GB/s of weights" in done.stdout
