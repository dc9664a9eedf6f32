"""The compiled module: registers its FFI handlers, and says what it cannot do."""

import importlib
import importlib.metadata
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from jax_megamoe.errors import PlatformError, ShapeError
from jax_megamoe.operands import Sizes

MOE_TARGET = "jax_megamoe.moe.v1"
MOE_PEERS_TARGET = "jax_megamoe.moe_peers.v3"
ROUTE_TARGET = "jax_megamoe.route.v1"
WIRE_TEST_TARGET = "jax_megamoe.wire_test.v1"
_PLATFORM = "CUDA"
_MAX_INT32 = (1 << 31) - 1
_FOLDER = Path(__file__).parent.parent  # that of `jax_megamoe`


class UnservedError(ShapeError):
    """The kernel does not serve a call of these sizes; `reason` says which of them, and what it serves."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}, wanted sizes that it serves: pass fewer at a time, or implementation='reference' to moe."
        )
        self.reason = reason


def _load() -> ModuleType | None:
    """`jax_megamoe._core` with its handlers registered, or None on a checkout that is not built."""
    try:
        core = importlib.import_module("jax_megamoe._core")
    except ModuleNotFoundError as error:
        if error.name != "jax_megamoe._core":
            raise
        return None
    registrations = core.ffi_registrations()
    # XLA looks up the types while it registers a handler that has state.
    for name, capsules in registrations["types"].items():
        jax.ffi.register_ffi_type(name, capsules, platform=_PLATFORM)
    for name, capsules in registrations["targets"].items():
        jax.ffi.register_ffi_target(name, capsules, platform=_PLATFORM)
    return core


def passed_over() -> tuple[Path, Path] | None:
    """The folders of these files, beside which there is no module, and of an installed package that has it.

    None elsewhere. Python looks into the folder in which it was started first, and a checkout has a `jax_megamoe`
    without the module.
    """
    if _core is not None:
        return None
    try:
        folder = Path(str(importlib.metadata.distribution("jax_megamoe").locate_file("jax_megamoe")))
    except importlib.metadata.PackageNotFoundError:
        return None
    has_module = any(folder.glob("_core.*"))
    return (_FOLDER.parent, folder.parent) if has_module and folder.resolve() != _FOLDER.resolve() else None


def _how_to_install(otherwise: str) -> str:
    """What to do where the module is not found: `otherwise`, unless it is there and was passed over."""
    if (folders := passed_over()) is None:
        return otherwise
    here, installed = folders
    return (
        f"start Python in another folder than {here}, whose Python files come before the package that is installed in "
        f"{installed}"
    )


# At import, since XLA wants the handlers before it loads an executable from the compilation cache.
_core = _load()


def check_kernel_available() -> None:
    """Raises `PlatformError` where the fused kernel is not built, or no GPU of this process can run it."""
    if _core is None or not _core.has_cuda:
        state = "is not built" if _core is None else "was built without CUDA"
        raise PlatformError(
            f"jax_megamoe._core {state}, wanted its CUDA kernels for a GPU: "
            f"{_how_to_install('install the package with MEGAMOE_CUDA=ON')}, or pass implementation='reference'."
        )
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return  # Lowering for another machine.
    capabilities = {device.device_kind: str(getattr(device, "compute_capability", "9.0")) for device in devices}
    if capabilities and "9.0" not in capabilities.values():
        found = ", ".join(f"{kind} ({capability})" for kind, capability in capabilities.items())
        raise PlatformError(
            f"the GPU is {found}, wanted compute capability 9.0 (Hopper) for the fused kernel: "
            "pass implementation='reference' elsewhere."
        )


def why_no_testing() -> str | None:
    """Why the module has not what only tests and benchmarks call, None where it has."""
    if getattr(_core, "has_testing", False):
        return None
    state = "is not built" if _core is None else "was built without what only tests and benchmarks call"
    return (
        f"jax_megamoe._core {state}: install the package by `pip install -e .`, or build its wheel with "
        "`-C cmake.define.MEGAMOE_TESTING=ON`"
    )


def check_testing_available() -> None:
    """Raises `PlatformError` where `why_no_testing` says something."""
    if reason := why_no_testing():
        raise PlatformError(f"{reason}.")


def workspace_bytes(sizes: Sizes) -> int:
    """Scratch memory that one call of the fused kernel needs on a device. Raises `UnservedError`."""
    return _bytes_for("workspace_bytes", sizes)


def peer_workspace_bytes(sizes: Sizes, num_ranks: int) -> int:
    """Scratch memory that one call of the fused kernel over a group needs on a device, for num_tokens of its own.

    Raises `UnservedError`.
    """
    return _bytes_for("peer_workspace_bytes", sizes, num_ranks)


def peer_buffer_bytes(sizes: Sizes, num_ranks: int) -> int:
    """Memory that each rank of a group shares with the others, for num_tokens of its own. Raises `UnservedError`."""
    return _bytes_for("peer_buffer_bytes", sizes, num_ranks)


def _bytes_for(name: str, sizes: Sizes, *more: int) -> int:
    function = _host_function(name)
    largest = max(size for size in (*sizes, *more) if isinstance(size, int))
    if largest > _MAX_INT32:
        raise UnservedError(f"a size of the call is {largest}; the kernel serves at most {_MAX_INT32}")
    try:
        return int(function(*sizes, *more))
    except ValueError as error:
        raise UnservedError(str(error).removeprefix("jax_megamoe.moe: ").rstrip(".")) from error
    except TypeError as error:  # more sizes than it knows
        raise PlatformError(
            f"jax_megamoe._core has another {name}, wanted a build of the same version as the Python files: "
            "install the package."
        ) from error


def _host_function(name: str) -> Callable[..., Any]:
    """A function of the compiled module; raises `PlatformError` where there is none."""
    if _core is None or not hasattr(_core, name):
        state = "is not built" if _core is None else f"has no {name}"
        raise PlatformError(
            f"jax_megamoe._core {state}, wanted a build of the same version as the Python files: "
            f"{_how_to_install('install the package')}."
        )
    return getattr(_core, name)


def symmetric_memories() -> list[dict[str, Any]]:
    """The buffers that this process shares with other ranks: device, rank, num_ranks, bytes, transport, failure."""
    return [] if _core is None or not _core.has_cuda else list(_core.symmetric_memories())


def can_access_peer(from_device: int, to_device: int) -> bool:
    """Whether a device of this process can reach the memory of another; both are local hardware ids.

    Raises `PlatformError` where the driver does not answer, as one that is too old for this build.
    """
    assert _core is not None, "check_kernel_available comes first"
    try:
        return bool(_core.can_access_peer(from_device, to_device))
    except RuntimeError as error:
        reason = str(error).removeprefix("jax_megamoe: ").rstrip(".")
        raise PlatformError(
            f"{reason}, wanted an answer of the GPU's driver: see what `python -m jax_megamoe doctor` says of it."
        ) from error


def host_identity() -> str:
    """What all processes of this host have in common, in containers too, and no others; as the set-up sees it."""
    if _core is not None:
        return str(_core.host_identity())
    # The same for all containers of a host, which the name is not.
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()
