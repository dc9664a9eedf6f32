"""What GPUs have in use, and a way to leave next to nothing of one."""

import contextlib
import ctypes
import subprocess
from collections.abc import Callable, Iterator


def used_mib() -> list[int] | None:
    """MiB of each GPU of this machine, by whomever; None where nobody tells."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [int(line) for line in text.split()]
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def fill(ordinal: int, leave: int) -> Callable[[], None]:
    """Takes all memory of a GPU of this process but so many bytes; returns what gives it back."""
    cuda, taken = ctypes.CDLL("libcuda.so.1"), []
    with _current(cuda, ordinal):
        size = 1 << 34
        while size >= leave:
            address, free, total = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_size_t()
            _check(cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
            # In pieces: what is free need not be in one.
            if free.value < size + leave or cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)):
                size //= 2
            else:
                taken.append(address)

    def release() -> None:
        with _current(cuda, ordinal):
            for address in taken:
                _check(cuda.cuMemFree_v2(address))

    return release


@contextlib.contextmanager
def _current(cuda: ctypes.CDLL, ordinal: int) -> Iterator[None]:
    """The context that the CUDA runtime, and so JAX, has on the GPU."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(cuda.cuDeviceGet(ctypes.byref(device), ordinal))
    _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    _check(cuda.cuCtxPushCurrent_v2(context))
    try:
        yield
    finally:
        _check(cuda.cuCtxPopCurrent_v2(ctypes.byref(context)))
        _check(cuda.cuDevicePrimaryCtxRelease_v2(device))


def _check(status: int) -> None:
    assert status == 0, f"CUDA's driver says {status}"
