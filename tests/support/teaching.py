"""The kernel in one page, examples/teaching/swap_ab.cu, compiled as its first lines say."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "examples" / "teaching" / "swap_ab.cu"


def compile_teaching(folder: Path) -> tuple[Path, str]:
    """The program, and what ptxas reports; skips the test where there is no nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs an nvcc on PATH")
    command = next(line for line in SOURCE.read_text().splitlines() if line.startswith("//   nvcc "))
    arguments = command.removeprefix("//   nvcc ").split()
    program = folder / arguments[arguments.index("-o") + 1]
    arguments[arguments.index("-o") + 1] = str(program)
    done = subprocess.run(
        [nvcc, "-Xptxas", "-v", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return program, done.stderr + done.stdout
