"""The C++ set-up of symmetric memory with threads as ranks, over a fake CUDA runtime and a fake NCCL: no GPU needed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native_program import CUDA, NATIVE, host_compiler


def cuda_include() -> Path:
    """The folder of the toolkit's headers, which declare what the fake runtime defines."""
    if nvcc := shutil.which("nvcc"):
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr
        for folder in map(Path, re.findall(r'"?-I([^"\s]+)"?', text)):
            if (folder / "cuda_runtime_api.h").exists():
                return folder
    pytest.skip("needs the headers of a CUDA toolkit, whose nvcc is on PATH")


def test_transport(tmp_path):
    include, compiler = cuda_include(), host_compiler()
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", f"-I{CUDA}", f"-I{NATIVE}", "-isystem", str(include)]
    nccl, program = tmp_path / "libnccl.so.2", tmp_path / "transport_test"
    library = [compiler, *flags, "-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", NATIVE / "fake_nccl.cc", "-o", nccl]
    sources = [NATIVE / "transport_test.cc", *sorted((CUDA / "transport").glob("*.cc"))]
    subprocess.run(library, check=True, timeout=120)
    subprocess.run([compiler, *flags, *sources, "-o", program, "-ldl", "-pthread"], check=True, timeout=280)
    result = subprocess.run([program, nccl], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
