"""Parts of the CUDA sources that run on the host, as small programs that tests compile and talk to by lines."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
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


def cuda_include() -> Path:
    """The folder of the toolkit's headers, which declare what the fake runtime defines."""
    if nvcc := shutil.which("nvcc"):
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr
        for folder in map(Path, re.findall(r'"?-I([^"\s]+)"?', text)):
            if (folder / "cuda_runtime_api.h").exists():
                return folder
    pytest.skip("needs the headers of a CUDA toolkit, whose nvcc is on PATH")


def compile_program(folder: Path, name: str, *sources: Path, flags: Sequence[str | Path] = ()) -> Callable[[str], str]:
    """Compiles tests/native/`name`.cc with other sources; returns a function from the program's input to its output."""
    program = folder / name
    files = [NATIVE / f"{name}.cc", *sources]
    command: list[str | Path] = [host_compiler(), "-std=c++17", "-O1", f"-I{CUDA}", *flags, *files, "-o", program]
    subprocess.run(command, check=True, timeout=120)

    def run(text: str) -> str:
        done = subprocess.run([program], input=text, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    return run
