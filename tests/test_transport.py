"""The C++ set-up of symmetric memory with threads as ranks, over a fake CUDA runtime and a fake NCCL: no GPU needed."""

import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.native_program import (
    CUDA,
    NATIVE,
    compile_program,
    cuda_include,
    host_compiler,
    sanitizer_environment,
    sanitizer_flags,
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The program, and what stands for libnccl.so.2; and how such a library is made of a source."""
    folder, include, compiler = tmp_path_factory.mktemp("native"), cuda_include(), host_compiler()
    warnings = ["-Wall", "-Wextra"]
    flags = [*sanitizer_flags(), "-std=c++17", "-O0", *warnings, f"-I{CUDA}", f"-I{NATIVE}", "-isystem", str(include)]

    def library(source: Path, name: str = "libnccl.so.2", *more: str) -> Path:
        options = ["-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", *more]
        subprocess.run([compiler, *flags, *options, source, "-o", folder / name], check=True, timeout=120)
        return folder / name

    parts = ("transport_test", "set_up_test", "late_ranks_test", "recovery_test", "fake_cuda")
    # Of the real sources, all but those that say which process this is: here one plays several.
    sources = [source for source in sorted((CUDA / "transport").glob("*.cc")) if source.name != "identity.cc"]
    sources += [NATIVE / f"{part}.cc" for part in parts]
    program = folder / "transport_test"
    subprocess.run([compiler, *flags, *sources, "-o", program, "-ldl", "-pthread"], check=True, timeout=280)
    return program, library(NATIVE / "fake_nccl.cc"), library


def run(*command: Any) -> "subprocess.CompletedProcess[str]":
    environment = sanitizer_environment()
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


def test_transport(build):
    program, nccl, _ = build
    result = run(program, nccl)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(Path("/dev/shm").glob("jax_megamoe-*")), "a mailbox keeps no name once all have it"


def test_without_nccl(build):
    program, _, _ = build
    wanted = "libnccl.so.2 is not loaded in this process; JAX's CUDA plugin loads it"
    assert run(program, "place").stdout.strip() == wanted


def test_an_nccl_that_lacks_functions(build, tmp_path):
    program, _, library = build
    source = tmp_path / "old.cc"
    source.write_text('extern "C" int ncclGetVersion(int* version) { return *version = 21300, 0; }\n')
    found = run(program, "place", library(source, "old.so"))
    assert found.stdout.strip() == "libnccl.so.2 lacks a function that every version since 2.14 has"


NO_PEER_ACCESS = "no rank can reach the memory of all others (peer access: rank 0: there is no peer access from device"


@pytest.mark.parametrize(
    "version, without_peer_access, windows_alone",
    [
        (22899, "NCCL window", "NCCL window"),
        (23102, NO_PEER_ACCESS, "this NCCL, or this build, does not offer windows, and nothing else was asked for"),
        (21803, NO_PEER_ACCESS, "this NCCL, or this build, does not offer windows, and nothing else was asked for"),
    ],
)
def test_an_nccl_of_another_version(build, version, without_peer_access, windows_alone):
    """Where only device code is told of peers' pointers, it has to be of the minor version that this build knows."""
    program, _, library = build
    other = library(NATIVE / "fake_nccl.cc", f"nccl-{version}.so", f"-DFAKE_NCCL_VERSION={version}")
    done = run(program, "windows", other)
    assert done.returncode == 0, done.stdout + done.stderr
    with_access, without_access, alone, again = done.stdout.splitlines()
    assert (with_access, again) == ("peer access", "whole")
    assert without_access.startswith(without_peer_access) and alone.startswith(windows_alone)
    if without_access != "NCCL window":
        assert 'implementation="collective"' in without_access


def test_hosts_are_told_apart_by_their_boot(tmp_path):
    boot = Path("/proc/sys/kernel/random/boot_id")
    wanted = boot.read_text().strip() if boot.exists() else ""
    printed = compile_program(tmp_path, "identity_test", CUDA / "transport" / "identity.cc")("")
    assert printed.strip() == (wanted or socket.gethostname())
