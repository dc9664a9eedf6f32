"""The GPUs of this host by names that every process has for them, and what the driver's libraries know of them.

What is not found out is left open: the set-up of a group tries everything anyway, and has an error for it.
"""

import ctypes
import itertools
from collections.abc import Set
from typing import Any

# nvmlGpuP2PCapsIndex: read, write.
_ACCESSES = (0, 1)
# nvmlGpuP2PStatus between 0 (OK) and 6 (unknown).
_NO_ACCESS = range(1, 6)


class _PciInfo(ctypes.Structure):
    """nvmlPciInfo_t."""

    _fields_ = (
        ("legacy_bus_id", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("pci_device_id", ctypes.c_uint),
        ("pci_subsystem_id", ctypes.c_uint),
        ("bus_id", ctypes.c_char * 32),
    )


def bus_ids() -> list[str]:
    """The PCI bus ids of the GPUs that CUDA shows to this process, by their ordinal; empty without a driver."""
    cuda, count, device = _load("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
    if cuda is None or cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    names = []
    for ordinal in range(count.value):
        text = ctypes.create_string_buffer(32)
        if cuda.cuDeviceGet(ctypes.byref(device), ordinal) or cuda.cuDeviceGetPCIBusId(text, len(text), device):
            return []
        names.append(text.value.decode().lower())
    return names


def unreachable(own: Set[str], visible: Set[str]) -> list[tuple[str, str]]:
    """Pairs of bus ids without access to each other's memory, one of `own` and one that CUDA does not show here."""
    nvml = _load("libnvidia-ml.so.1")
    if nvml is None or nvml.nvmlInit_v2():
        return []
    try:
        handles = _handles(nvml)
        return [
            (one, other)
            for one, other in itertools.product(sorted(own & set(handles)), sorted(set(handles) - visible))
            if one != other and _refuses(nvml, handles[one], handles[other])
        ]
    finally:
        nvml.nvmlShutdown()


def _load(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _handles(nvml: Any) -> dict[str, ctypes.c_void_p]:
    count, found = ctypes.c_uint(), {}
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return {}
    for index in range(count.value):
        handle, info = ctypes.c_void_p(), _PciInfo()
        # A GPU of another container is counted, and refused.
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            continue
        if not nvml.nvmlDeviceGetPciInfo_v3(handle, ctypes.byref(info)):
            # As CUDA writes it; the library's own text has more digits.
            found[f"{info.domain:04x}:{info.bus:02x}:{info.device:02x}.0"] = handle
    return found


def _refuses(nvml: Any, one: ctypes.c_void_p, other: ctypes.c_void_p) -> bool:
    status = ctypes.c_uint()
    return any(
        not nvml.nvmlDeviceGetP2PStatus(one, other, access, ctypes.byref(status)) and status.value in _NO_ACCESS
        for access in _ACCESSES
    )
