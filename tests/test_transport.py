"""The C++ set-up of symmetric memory with threads as ranks, over a fake CUDA runtime and a fake NCCL: no GPU needed."""

import socket
import subprocess
from pathlib import Path

from tests.support.native_program import (
    CUDA,
    NATIVE,
    compile_program,
    cuda_include,
    host_compiler,
    sanitizer_environment,
    sanitizer_flags,
)


def test_transport(tmp_path):
    include, compiler = cuda_include(), host_compiler()
    flags = [
        *sanitizer_flags(),
        "-std=c++17",
        "-O0",
        "-Wall",
        "-Wextra",
        f"-I{CUDA}",
        f"-I{NATIVE}",
        "-isystem",
        str(include),
    ]
    nccl, program = tmp_path / "libnccl.so.2", tmp_path / "transport_test"
    library = [compiler, *flags, "-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", NATIVE / "fake_nccl.cc", "-o", nccl]
    parts = ("transport_test", "set_up_test", "late_ranks_test", "recovery_test", "fake_cuda")
    # Of the real sources, all but those that say which process this is: here one plays several.
    sources = [source for source in sorted((CUDA / "transport").glob("*.cc")) if source.name != "identity.cc"]
    sources += [NATIVE / f"{part}.cc" for part in parts]
    subprocess.run(library, check=True, timeout=120)
    subprocess.run([compiler, *flags, *sources, "-o", program, "-ldl", "-pthread"], check=True, timeout=280)
    command, environment = [program, nccl], sanitizer_environment()
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(Path("/dev/shm").glob("jax_megamoe-*")), "a mailbox keeps no name once all have it"


def test_hosts_are_told_apart_by_their_boot(tmp_path):
    boot = Path("/proc/sys/kernel/random/boot_id")
    wanted = boot.read_text().strip() if boot.exists() else ""
    printed = compile_program(tmp_path, "identity_test", CUDA / "transport" / "identity.cc")("")
    assert printed.strip() == (wanted or socket.gethostname())
