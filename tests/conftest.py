"""Settings that have to precede jax's start: which backend the tests use, and with how many devices."""

import gc
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def _has_cuda_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13, 14))


if "JAX_PLATFORMS" not in os.environ and not _has_cuda_plugin():
    os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the tests' time. What XLA made of a program for CPUs is kept for other processes and for the next run,
# under a key of the program, the version and the flags of XLA.
on_cpu_only = os.environ.get("JAX_PLATFORMS") == "cpu" and not _has_cuda_plugin()
if on_cpu_only and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "jax_programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def add_xla_flag(flag: str) -> None:
    """Unless the environment has one of that name."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


# Only the host platform reads it: tests of sharding find eight CPU devices, beside a GPU too.
add_xla_flag("--xla_force_host_platform_device_count=8")
# Most programs of tests run once and briefly. LLVM's optimisation takes 40 % of the time to compile, and XLA's newer
# way to write loops for CPUs, through MLIR, more than half of the rest; a jax that no longer has the older way ignores
# the flag. `.ci/run` leaves XLA as users have it for some files on the newest jax; the fixture `optimized` lets LLVM
# optimise programs that compute much.
if on_cpu_only and os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    add_xla_flag("--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")
    # XLA cuts each program into up to 32 modules, to compile them side by side. Each has a price, and cores are busy
    # anyway: in one piece it takes a quarter less. Optimised it makes no difference.
    add_xla_flag("--xla_cpu_parallel_codegen_split_count=1")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run only the first and the last case of each parametrised test"
    parser.addoption("--first-and-last", action="store_true", help=text)


@pytest.hookimpl(trylast=True)  # after marks have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--first-and-last`: each test in two forms, for what is tried in all its forms elsewhere."""
    if not config.getoption("first_and_last"):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {case for each in cases.values() for case in (each[0], each[-1])}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish() -> None:
    """What modules and tests consist of stays: Python need not search it for garbage while JAX traces, nor so often."""
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """XLA optimises what it compiles for a CPU, for a whole file of tests."""
    import jax

    flag = "jax_disable_most_optimizations"
    before = jax.config.read(flag)
    jax.config.update(flag, False)
    yield
    jax.config.update(flag, before)


@pytest.fixture
def built(monkeypatch) -> Any:
    """As if the package were built with CUDA, on a machine without a GPU; returns the fake of the compiled module."""
    import jax

    from jax_megamoe.primitives import _library
    from tests.support import cuda_lowering

    core = cuda_lowering.fake_core()
    monkeypatch.setattr(_library, "_core", core)
    monkeypatch.setattr(jax, "local_devices", cuda_lowering.no_devices)
    return core


@pytest.fixture
def cuda_core() -> Any:
    """The compiled module, built with CUDA; on a machine without a GPU too."""
    from tests.support import skips

    if reason := skips.why_no_cuda_build():
        pytest.skip(reason)
    return importlib.import_module("jax_megamoe._core")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def each_platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forms of a test of meshes: on host devices, of which the settings above make eight, and, with the mark `gpu`, on
    two, four or eight GPUs, where the meshes are smaller as far as needed.
    """
    from tests.support import meshes

    monkeypatch.setattr(meshes, "platform", request.param)
    if len(meshes.find_devices()) < 2:
        pytest.skip(f"needs 2 devices of a {request.param}; this process sees fewer")


@pytest.fixture
def eight_devices(each_platform: None) -> None:
    """Sizes of axes are in messages, or a mesh of fewer devices would serve what is to be refused."""
    from tests.support import meshes

    if len(meshes.find_devices()) < 8:
        pytest.skip("needs 8 devices")
