"""Parts of the CUDA sources that run on the host, as small programs that tests compile and talk to by lines."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
CUDA = TESTS.parent / "jax_megamoe" / "cuda"
NATIVE = TESTS / "native"


def host_compiler() -> str:
    """The C++ compiler; skips the test where there is none."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    return compiler


def compile_program(folder: Path, name: str, *sources: Path) -> Callable[[str], str]:
    """Compiles tests/native/`name`.cc with other sources; returns a function from the program's input to its output."""
    program = folder / name
    files = [NATIVE / f"{name}.cc", *sources]
    command: list[str | Path] = [host_compiler(), "-std=c++17", "-O1", f"-I{CUDA}", *files, "-o", program]
    subprocess.run(command, check=True, timeout=120)

    def run(text: str) -> str:
        done = subprocess.run([program], input=text, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    return run
