"""Parts of the CUDA sources that run on the host, as small programs that tests compile and talk to by lines.

MEGAMOE_SANITIZE in the environment, "address,undefined" or "thread", compiles them with these sanitizers, whose first
finding ends a program with an error (`scripts/sanitize`).
"""

import importlib.util
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


def sanitizer_flags() -> list[str]:
    """What the compiler is told besides; nothing without MEGAMOE_SANITIZE."""
    names = os.environ.get("MEGAMOE_SANITIZE")
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"] if names else []


def sanitizer_environment() -> dict[str, str]:
    """For a program: what lives as long as the process, as sessions do, is no leak."""
    return {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}


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
    command: list[str | Path] = [host_compiler(), "-std=c++17", "-O1", *sanitizer_flags(), f"-I{CUDA}", *flags, *files]
    subprocess.run([*command, "-o", program], check=True, timeout=240)

    def run(text: str) -> str:
        environment = sanitizer_environment()
        done = subprocess.run(
            [program], input=text, capture_output=True, text=True, check=False, timeout=120, env=environment
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run


def compile_handlers(folder: Path) -> Callable[[str], str]:
    """The FFI handlers, `handlers_test`, with a fake runtime, fake launches and groups that are fakes."""
    jaxlib = importlib.util.find_spec("jaxlib")
    assert jaxlib is not None and jaxlib.origin is not None
    flags: list[str | Path] = ["-isystem", Path(jaxlib.origin).parent / "include", "-isystem", cuda_include()]
    names = ("moe_handler", "moe_peers_handler", "route_handler", "wire_test_handler", "moe_call", "call_site")
    sources = [CUDA / "ffi" / f"{name}.cc" for name in names]
    sources += [CUDA / "host" / f"{name}.cc" for name in ("limits", "counter_arena", "peers")]
    sources += [NATIVE / f"{name}.cc" for name in ("fake_cuda", "fake_launches")]
    # What XLA's headers are made into is compiled for long and runs for a moment: -O0.
    return compile_program(folder, "handlers_test", *sources, flags=["-fno-access-control", "-O0", *flags])
