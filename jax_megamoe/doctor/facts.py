"""What this machine and this process have: versions, GPUs, memory, and what JAX makes of them. Judges nothing."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

import jax_megamoe
from jax_megamoe.errors import PlatformError
from jax_megamoe.primitives import _gpus, _library, _reachability
from jax_megamoe.primitives.moe_peers import SETUP_TIMEOUT_VARIABLE, TIMEOUT_VARIABLE
from jax_megamoe.xla_flags import missing_xla_flags, recommended_xla_flags

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy", "ml_dtypes")
_NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
_VARIABLES = (
    "JAX_PLATFORMS",
    "CUDA_VISIBLE_DEVICES",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    TIMEOUT_VARIABLE,
    SETUP_TIMEOUT_VARIABLE,
)
_QUERY = ("pci.bus_id", "name", "compute_cap", "driver_version", "memory.total", "memory.free")
_MIB = 1 << 20


class Jax(NamedTuple):
    """JAX as it has started, or why it has not."""

    backend: str | None
    error: str | None
    devices: list[Any]


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine, as the driver tells of it; whether JAX uses it is another question."""

    bus_id: str
    name: str
    compute_capability: str
    driver: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Device:
    """A device of this process, as JAX tells of it; numbers are None where they are not known."""

    platform: str
    kind: str
    compute_capability: str | None
    bus_id: str | None
    xla_bytes: int | None  # that XLA may take
    bytes_beside_xla: int | None  # free, and not XLA's to take


@dataclass(frozen=True)
class Facts:
    """All of it, as plain values."""

    versions: dict[str, str]
    nccl: str | None
    module: str  # "built with CUDA", or what it lacks
    ffi_targets: list[str]
    ffi_versions: dict[str, str]
    gpus: list[Gpu]
    backend: str | None  # None where JAX does not start
    backend_error: str | None
    devices: list[Device]
    peer_access: list[list[bool]]  # of JAX's GPUs, row to column; empty where there are none
    why_no_kernel: str | None
    why_no_group: str | None  # why ranks on all GPUs of this process are not served by one kernel
    xla_flags: str
    recommended_xla_flags: str
    missing_xla_flags: str
    environment: dict[str, str]
    passed_over: list[str]  # folder of these files, and of an installed package with the module; empty elsewhere


def start_jax() -> Jax:
    """Starts JAX. Only once: where that fails, it fails without a reason the next time."""
    try:
        return Jax(jax.default_backend(), None, jax.local_devices())
    except Exception as error:
        return Jax(None, f"{type(error).__name__}: {error}".rstrip(": "), [])


def gather(jax_here: Jax) -> Facts:
    """Asks the machine."""
    backend, backend_error, local = jax_here
    gpus = parse_gpus(_output("nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"))
    why_no_kernel, why_no_group, access = _ways(local if backend == "gpu" else [])
    return Facts(
        versions={"jax_megamoe": jax_megamoe.__version__, "python": platform.python_version(), **_versions(_PACKAGES)},
        nccl=next(iter(_versions(_NCCL_PACKAGES).values()), None),
        module=_module(),
        ffi_targets=_ffi_targets(),
        ffi_versions=_ffi_versions(),
        gpus=gpus,
        backend=backend,
        backend_error=backend_error,
        devices=_devices(local, gpus),
        peer_access=access,
        why_no_kernel=why_no_kernel,
        why_no_group=why_no_group,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        recommended_xla_flags=recommended_xla_flags(),
        missing_xla_flags=missing_xla_flags(),
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        passed_over=[str(folder) for folder in _library.passed_over() or ()],
    )


def parse_gpus(text: str) -> list[Gpu]:
    """What `nvidia-smi` printed for `_QUERY`; GPUs of which it does not know all that is asked are left out."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(_QUERY) or not all(cell.isdigit() for cell in cells[4:]):
            continue
        bus_id, name, capability, driver, total, free = cells
        # CUDA writes a bus id with four digits of the domain, this program with eight.
        gpus.append(Gpu(bus_id.lower()[-12:], name, capability, driver, int(total) * _MIB, int(free) * _MIB))
    return gpus


def bytes_beside_xla(gpu: Gpu | None, stats: dict[str, int] | None) -> int | None:
    """What is free on a GPU and not XLA's to take, by the driver and by `jax.Device.memory_stats`."""
    if gpu is None or not stats or "bytes_limit" not in stats:
        return None
    # XLA has taken its share at once, unless it was told not to; what it will take yet is not free.
    has_taken = stats.get("pool_bytes", stats.get("bytes_in_use", 0))
    return max(0, gpu.free_bytes - max(0, stats["bytes_limit"] - has_taken))


def _devices(local: Sequence[Any], gpus: Sequence[Gpu]) -> list[Device]:
    by_bus_id = {gpu.bus_id: gpu for gpu in gpus}
    bus_ids = _gpus.bus_ids() if any(device.platform == "gpu" for device in local) else []
    found = []
    for device in local:
        bus_id = stats = None
        if device.platform == "gpu":
            number = device.local_hardware_id
            bus_id = bus_ids[number] if number in range(len(bus_ids)) else None
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                stats = device.memory_stats()
        found.append(
            Device(
                device.platform,
                device.device_kind,
                getattr(device, "compute_capability", None),
                bus_id,
                (stats or {}).get("bytes_limit"),
                bytes_beside_xla(by_bus_id.get(bus_id or ""), stats),
            )
        )
    return found


def _ways(gpus: Sequence[Any]) -> tuple[str | None, str | None, list[list[bool]]]:
    """Why there is no kernel for these GPUs of JAX's, why there is none for all together, and who reaches whom."""
    if not gpus:
        return None, None, []
    try:
        _library.check_kernel_available()
        ids = [device.local_hardware_id for device in gpus]
        access = [[_library.can_access_peer(one, other) for other in ids] for one in ids]
    except PlatformError as error:
        return str(error), None, []
    return None, _reachability.reason_for_collectives(gpus, {"expert": len(gpus)}, ("expert",)), access


def _module() -> str:
    core = _library._core
    if core is None:
        return "not built"
    if not core.has_cuda:
        return "built without CUDA"
    return "built with CUDA" + (", and with what only tests and benchmarks call" if core.has_testing else "")


def _ffi_targets() -> list[str]:
    return [] if _library._core is None else sorted(_library._core.ffi_registrations()["targets"])


def _ffi_versions() -> dict[str, str]:
    """Of XLA's FFI and of its extension for communicators, as the headers of the installed jaxlib say."""
    folder = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api"
    names = {
        "XLA FFI": ("c_api.h", "XLA_FFI_API_MAJOR", "XLA_FFI_API_MINOR"),
        "Collectives extension": (
            "collectives_c_api.h",
            "XLA_FFI_Extension_Collectives_MajorVersion",
            "XLA_FFI_Extension_Collectives_MinorVersion",
        ),
    }
    found = {}
    for name, (file, *macros) in names.items():
        text = (folder / file).read_text() if (folder / file).exists() else ""
        numbers = [re.search(rf"#define {macro} (\d+)", text) for macro in macros]
        found[name] = ".".join(number[1] for number in numbers if number) or "absent"
    return found


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
