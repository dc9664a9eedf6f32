"""Why a test cannot run here: each `why_no_...` returns a reason to skip it, or None.

They ask for the devices, which a process of several must not do before it has joined the others.
"""

import importlib
import importlib.util
from typing import Any

import jax
import pytest

from jax_megamoe.errors import MegaMoEError
from jax_megamoe.primitives import _library, _reachability


def gpus() -> list[Any]:
    """The GPUs that this process sees."""
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


def why_no_host_devices(count: int = 8) -> str | None:
    """Fewer CPU devices than that: conftest.py asks for eight."""
    found = len(jax.devices("cpu"))
    return None if found >= count else f"needs {count} host devices; this process has {found}"


def why_no_gpus(count: int = 1) -> str | None:
    """Fewer GPUs than that."""
    wanted = "a GPU" if count == 1 else f"{count} GPUs"
    return None if len(gpus()) >= count else f"needs {wanted}; this process sees {len(gpus())}"


def why_no_hopper() -> str | None:
    """No GPU that the kernels are for."""
    if reason := why_no_gpus():
        return reason
    capability = str(getattr(gpus()[0], "compute_capability", "?"))
    return None if capability == "9.0" else f"needs compute capability 9.0; this GPU has {capability}"


def why_no_cuda_build() -> str | None:
    """A package without its kernels, also where a test has put a fake in the place of the compiled module."""
    try:
        core = importlib.import_module("jax_megamoe._core")
    except ModuleNotFoundError:
        return "jax_megamoe._core is not built: `pip install -e .` builds it"
    return None if core.has_cuda else "jax_megamoe._core was built without CUDA (MEGAMOE_CUDA=OFF)"


def why_no_group() -> str | None:
    """No GPUs that one kernel can serve together."""
    if reason := why_no_gpus(2) or why_no_kernel():
        return reason
    return _reachability.reason_for_collectives(gpus(), {"expert": len(gpus())}, ("expert",))


def why_no_kernel() -> str | None:
    """A build, or a GPU, for which `moe` has no kernel."""
    try:
        _library.check_kernel_available()
    except MegaMoEError as error:
        return str(error)
    return None


def why_no_cuda_plugin() -> str | None:
    """No XLA for GPUs, which compiles programs without one, too."""
    names = ("jax_plugins", "jax_plugins.xla_cuda13")
    if any(importlib.util.find_spec(name) is None for name in names):
        return "needs jax-cuda13-plugin, which is not installed"
    return None


def why_no_testing() -> str | None:
    """A build without what only tests and benchmarks call: virtual ranks, the read ceiling, a kernel that holds SMs."""
    return _library.why_no_testing()


def unless(reason: str | None) -> pytest.MarkDecorator:
    """Skips a test where there is a reason to."""
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def gpu_tests(reason: str | None) -> list[pytest.MarkDecorator]:
    """The marks of a file of GPU tests, with the reason to skip them all, if there is one."""
    return [pytest.mark.gpu, unless(reason)]
