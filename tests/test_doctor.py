"""`python -m jax_megamoe doctor` on this machine, and what it says of machines that are only described."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import types
from typing import Any

import jax
import pytest

import jax_megamoe as mm
from jax_megamoe import doctor
from jax_megamoe.doctor import check, facts, text, verdict
from jax_megamoe.doctor.check import Check
from jax_megamoe.doctor.facts import Device, Facts, Gpu
from jax_megamoe.errors import MegaMoEError
from jax_megamoe.primitives import _gpus, _library, _reachability

GB = 10**9
WELL = Check(num_devices=1, difference=1e-3, seconds=2.0, error=None)
FLAGS = mm.recommended_xla_flags()


def h200(number: int = 0, driver: str = "580.95.05") -> Gpu:
    return Gpu(f"0000:{number:02x}:00.0", "NVIDIA H200", "9.0", driver, 150 * GB, 30 * GB)


def device_of(gpu: Gpu, left: int = 30 * GB) -> Device:
    return Device("gpu", gpu.name, gpu.compute_capability, gpu.bus_id, 110 * GB, left)


CPU = Facts(
    versions={"jax_megamoe": "0.1.0", "jax": "0.12.0"},
    nccl=None,
    module="built without CUDA",
    ffi_targets=[],
    ffi_versions={"XLA FFI": "0.5"},
    gpus=[],
    backend="cpu",
    backend_error=None,
    devices=[Device("cpu", "cpu", None, None, None, None)],
    peer_access=[],
    why_no_kernel=None,
    why_no_group=None,
    xla_flags="",
    recommended_xla_flags=FLAGS,
    missing_xla_flags=FLAGS,
    environment={},
    passed_over=[],
)


def gpu_machine(count: int, **changes: Any) -> Facts:
    gpus = [h200(number) for number in range(count)]
    return dataclasses.replace(
        CPU,
        **{
            "nccl": "2.29.2",
            "module": "built with CUDA",
            "ffi_targets": ["jax_megamoe.moe.v1"],
            "gpus": gpus,
            "backend": "gpu",
            "devices": [device_of(gpu) for gpu in gpus],
            "peer_access": [[True] * count for _ in range(count)],
            "missing_xla_flags": "",
            **changes,
        },
    )


@pytest.mark.parametrize(
    ("machine", "implementation", "why"),
    [
        (CPU, "reference", "JAX's default backend is the CPU"),
        (gpu_machine(1), "cuda", "the GPU is a Hopper"),
        (gpu_machine(4), "cuda", "one kernel over all 4 GPUs of this process"),
        (gpu_machine(2, why_no_group="GPU 0 has no access"), "collective", "between them: GPU 0 has no access"),
        (gpu_machine(1, why_no_kernel="the GPU is an A100, wanted"), "none", "the GPU is an A100"),
        (dataclasses.replace(CPU, backend=None, devices=[]), "none", "JAX does not start"),
        (dataclasses.replace(CPU, backend="tpu"), "none", "default backend is tpu"),
    ],
)
def test_which_implementation_and_why(machine, implementation, why):
    found = verdict.choose(machine)
    assert found[0] == implementation and why in found[1]


OLD = {"nccl": "2.28.9", "versions": {"jax": "0.11.2"}}


@pytest.mark.parametrize(
    "machine", [CPU, gpu_machine(1), gpu_machine(8), gpu_machine(1, nccl="2.28.9"), gpu_machine(8, **OLD)]
)
def test_machines_that_are_well(machine):
    report = verdict.judge(machine, WELL)
    assert report.is_well and report.problems == [] and report.notes == []
    assert text.lines_of(report)[-1] == "All is well."


A100 = "the GPU is an A100 (8.0), wanted compute capability 9.0 (Hopper)"
NEW_DRIVER = "wanted 580 or newer for a build with CUDA 13"


@pytest.mark.parametrize(
    ("machine", "result", "problems"),
    [
        (
            gpu_machine(1),
            dataclasses.replace(WELL, difference=0.3),
            ["differs from float32 by 0.3, wanted at most 0.002"],
        ),
        (gpu_machine(1), dataclasses.replace(WELL, difference=float("nan")), ["differs from float32 by nan"]),
        (gpu_machine(1), Check(1, None, 1.0, "JaxRuntimeError: lost"), ["a tiny layer failed: JaxRuntimeError: lost"]),
        # One reason is enough.
        (gpu_machine(1, why_no_kernel=A100), Check(1, None, 1.0, f"PlatformError: {A100}"), [A100]),
        (
            gpu_machine(1, gpus=[h200(driver="570.1")]),
            Check(1, None, 1.0, "JaxRuntimeError: no kernel image"),
            ["no kernel image", f"the driver is 570.1, {NEW_DRIVER}"],
        ),
        (
            gpu_machine(2, nccl="2.28.9"),
            WELL,
            ["NCCL is 2.28.9, wanted 2.29.2 or newer for XLA's collectives of jax 0.12.0"],
        ),
        (dataclasses.replace(CPU, gpus=[h200(), h200(1)]), WELL, ["has 2 x NVIDIA H200, and JAX runs on the CPU"]),
        (
            dataclasses.replace(CPU, backend=None, backend_error="no plugin", devices=[]),
            None,
            ["JAX does not start (no plugin): unset JAX_PLATFORMS"],
        ),
    ],
)
def test_problems(machine, result, problems):
    report = verdict.judge(machine, result)
    assert not report.is_well and len(report.problems) == len(problems)
    for problem, wanted in zip(report.problems, problems, strict=True):
        assert wanted in problem
    lines = text.lines_of(report)
    assert [line for line in lines if line.startswith("problem: ")] == [f"problem: {p}" for p in report.problems]
    assert lines[-1] == f"{len(problems)} problem(s)."


def test_an_old_driver_that_serves_is_none():
    assert verdict.judge(gpu_machine(1, gpus=[h200(driver="570.1")]), WELL).is_well


@pytest.mark.parametrize(
    ("machine", "note"),
    [
        (gpu_machine(1, missing_xla_flags=FLAGS), f"for jax.lax.while_loop set XLA_FLAGS='{FLAGS}'"),
        (gpu_machine(2, devices=[device_of(h200(), 10**8)] * 2), "only 0.10 GB are left beside XLA's memory"),
        (
            dataclasses.replace(CPU, gpus=[h200()], environment={"JAX_PLATFORMS": "cpu"}),
            "JAX_PLATFORMS keeps JAX from 1",
        ),
        (
            dataclasses.replace(CPU, module="not built", passed_over=["/checkout", "/site-packages"]),
            "installed in /site-packages is not the one that was tried: start Python in another folder than /checkout",
        ),
    ],
)
def test_notes(machine, note):
    report = verdict.judge(machine, WELL)
    (found,) = report.notes
    assert report.is_well and note in found and f"note: {found}" in text.lines_of(report)


def test_lines_of_a_gpu_machine():
    machine = gpu_machine(2, peer_access=[[True, True], [False, True]], xla_flags="--xla_a=1", environment={"A": "b"})
    lines = dict(line.split(None, 1) for line in text.lines_of(verdict.judge(machine, WELL)) if "  " in line)
    assert (
        lines["GPU"] == "NVIDIA H200 at 0000:01:00.0, SM 9.0, driver 580.95.05, 30.0 of 150.0 GB free"
    )  # the last one
    assert lines["JAX"].endswith("at 0000:01:00.0, 110.0 GB for XLA, 30.0 GB left for buffers that ranks share")
    assert lines["peer"] == "access  1 has none to 0"
    assert lines["NCCL"] == "2.29.2" and lines["XLA_FLAGS"] == "--xla_a=1" and lines["A"] == "b"
    assert lines["recommended"] == f"{FLAGS} (set)" and "by 1.0e-03 (allowed: 2.0e-03;" in lines["check"]
    assert f"{FLAGS} (for loops on GPUs)" in "\n".join(text.lines_of(verdict.judge(CPU, WELL)))


def test_what_the_driver_tells():
    output = (
        "00000000:1B:00.0, NVIDIA H200, 9.0, 580.95.05, 143771, 143167\n00000000:43:00.0, MIG, 9.0, 580, [N/A], 1\n"
    )
    (gpu,) = facts.parse_gpus(output)
    assert gpu == Gpu("0000:1b:00.0", "NVIDIA H200", "9.0", "580.95.05", 143771 << 20, 143167 << 20)
    assert facts.parse_gpus("") == facts.parse_gpus("No devices were found\n") == []


def test_memory_beside_xla():
    gpu = h200()
    assert facts.bytes_beside_xla(gpu, {"bytes_limit": 110 * GB, "pool_bytes": 110 * GB}) == 30 * GB
    # What XLA may take, and has not taken yet, is not free.
    assert facts.bytes_beside_xla(gpu, {"bytes_limit": 20 * GB, "pool_bytes": 5 * GB}) == 15 * GB
    assert facts.bytes_beside_xla(gpu, {"bytes_limit": 110 * GB, "bytes_in_use": 0}) == 0
    assert facts.bytes_beside_xla(gpu, None) is None and facts.bytes_beside_xla(None, {"bytes_limit": 1}) is None


def fake_gpu(number: int, capability: str = "9.0") -> Any:
    return types.SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA H200",
        compute_capability=capability,
        local_hardware_id=number,
        memory_stats=lambda: {"bytes_limit": 110 * GB, "pool_bytes": 110 * GB},
    )


def fake_core(**changes: Any) -> Any:
    registrations = {"types": {}, "targets": {"jax_megamoe.moe.v1": None}}
    functions = {"ffi_registrations": lambda: registrations, "can_access_peer": lambda one, other: one <= other}
    return types.SimpleNamespace(**{"has_cuda": True, "has_testing": False, **functions, **changes})


def gather_with(monkeypatch, devices: list[Any], core: Any, smi: str = "") -> Facts:
    monkeypatch.setattr(_library, "_core", core)
    monkeypatch.setattr(jax, "local_devices", lambda **_: devices)
    monkeypatch.setattr(facts, "_output", lambda *command: smi)
    monkeypatch.setattr(_gpus, "bus_ids", lambda: ["0000:1b:00.0", "0000:43:00.0"])
    monkeypatch.setattr(_reachability, "reason_for_collectives", lambda devices, sizes, axes: f"{sizes} {axes}")
    return facts.gather(facts.Jax("gpu", None, devices))


def test_facts_of_a_gpu_machine(monkeypatch):
    smi = "".join(f"00000000:{bus}:00.0, NVIDIA H200, 9.0, 580.95.05, 143771, 30000\n" for bus in ("43", "1B"))
    found = gather_with(monkeypatch, [fake_gpu(0), fake_gpu(1)], fake_core(), smi)
    assert found.module == "built with CUDA" and found.ffi_targets == ["jax_megamoe.moe.v1"]
    assert [device.bus_id for device in found.devices] == ["0000:1b:00.0", "0000:43:00.0"]
    assert found.devices[0].bytes_beside_xla == 30000 << 20 and found.devices[0].xla_bytes == 110 * GB
    assert found.peer_access == [[True, True], [False, True]] and found.why_no_kernel is None
    assert found.why_no_group == "{'expert': 2} ('expert',)"
    assert json.loads(json.dumps(dataclasses.asdict(found)))["gpus"][0]["bus_id"] == "0000:43:00.0"


@pytest.mark.parametrize(
    ("core", "capability", "module", "reason"),
    [
        (None, "9.0", "not built", "is not built, wanted its CUDA kernels"),
        (fake_core(has_cuda=False), "9.0", "built without CUDA", "was built without CUDA, wanted its CUDA kernels"),
        (fake_core(), "8.0", "built with CUDA", "wanted compute capability 9.0 (Hopper)"),
    ],
)
def test_gpus_without_a_kernel(monkeypatch, core, capability, module, reason):
    found = gather_with(monkeypatch, [fake_gpu(0, capability)], core)
    assert found.module == module and found.why_no_kernel is not None and reason in found.why_no_kernel
    assert found.peer_access == [] and found.devices[0].bytes_beside_xla is None
    assert verdict.choose(found)[0] == "none"


def test_a_checkout_that_is_found_before_the_package(monkeypatch, tmp_path):
    """As in the folder in which `pip install .` was run: Python takes its files, beside which there is no module."""
    (tmp_path / "jax_megamoe").mkdir()
    distribution = types.SimpleNamespace(locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    monkeypatch.setattr(_library, "_core", None)
    assert _library.passed_over() is None
    (tmp_path / "jax_megamoe" / "_core.cpython-312-x86_64-linux-gnu.so").touch()
    with pytest.raises(MegaMoEError, match=r"start Python in another folder than .*installed in .*, or pass impl"):
        _library.check_kernel_available()
    passed_over = _library.passed_over()
    assert passed_over is not None and passed_over[1] == tmp_path
    with pytest.raises(
        MegaMoEError, match=r"version as the Python files: start Python in another folder than .*installed in .*\.$"
    ):
        mm.expert_parallel.buffer_bytes(8, 6, 4096, 2048, 256, 8)


def test_a_driver_that_does_not_answer(monkeypatch):
    """As one that is too old for this build, which is met before a layer is tried; the doctor says so."""

    def refuse(one: int, other: int) -> bool:
        raise RuntimeError("jax_megamoe: asking whether device 0 reaches device 1 failed: the driver is insufficient")

    smi = "00000000:1B:00.0, NVIDIA H200, 9.0, 550.54, 143771, 30000\n"
    found = gather_with(monkeypatch, [fake_gpu(0), fake_gpu(1)], fake_core(can_access_peer=refuse), smi)
    report = verdict.judge(found, Check(2, None, 1.0, "PlatformError"))
    reason, driver = report.problems
    assert reason.startswith("asking whether device 0 reaches device 1 failed: the driver is insufficient, wanted")
    assert driver.startswith("the driver is 550.54, wanted 580 or newer")


def test_the_headers_of_jaxlib_have_versions():
    found = facts._ffi_versions()
    assert set(found) == {"XLA FFI", "Collectives extension"}
    assert all(version.count(".") == 1 for version in found.values()), found


def test_the_check_over_two_devices():
    devices = jax.devices("cpu")[:2]
    found = check.run_check(devices)
    assert found.error is None and found.num_devices == 2
    assert found.difference is not None and 1e-5 < found.difference < check.LIMIT


def test_the_check_sees_what_is_wrong(monkeypatch):
    right = mm.moe
    monkeypatch.setattr(mm, "moe", lambda *arguments: right(*arguments) * 1.1)
    found = check.run_check(jax.devices("cpu")[:1])
    assert found.difference is not None and found.difference > check.LIMIT
    monkeypatch.setattr(mm, "moe", lambda *arguments: 1 / 0)
    assert check.run_check(jax.devices("cpu")[:1]).error == "ZeroDivisionError: division by zero"


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "jax_megamoe", *arguments]
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        command, env={**clean, **environment}, capture_output=True, text=True, timeout=200, check=False
    )


def test_the_command_on_a_cpu():
    done = run("doctor", "--json", JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["is_well"] and report["implementation"] == "reference" and report["problems"] == []
    assert report["check"]["num_devices"] == 1 and report["check"]["difference"] < check.LIMIT
    assert report["facts"]["versions"]["jax_megamoe"] == mm.__version__
    assert report["facts"]["versions"]["jax"] == jax.__version__
    assert report["facts"]["environment"]["JAX_PLATFORMS"] == "cpu"


def test_the_command_where_jax_does_not_start():
    done = run("doctor", JAX_PLATFORMS="no_such_platform")
    assert done.returncode == 1 and "problem: JAX does not start" in done.stdout


def test_the_status_is_that_of_the_report(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: verdict.judge(gpu_machine(1, why_no_kernel=A100), WELL))
    assert doctor.main([]) == 1
    assert f"problem: {A100}" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda: verdict.judge(gpu_machine(1), WELL))
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["implementation"] == "cuda"
