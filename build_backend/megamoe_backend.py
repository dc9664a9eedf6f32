"""Build backend of jax_megamoe: scikit-build-core, which gets its CUDA compiler from the machine or from wheels.

An `nvcc` is looked for in CUDACXX, on PATH, then in CUDA_HOME and CUDA_PATH. Where none is found, the compiler and its
libraries become build requirements, so that `pip install` works on a machine that has only a C++ compiler.
`-C cmake.define.MEGAMOE_CUDA=OFF` builds without CUDA and asks for no compiler.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from scikit_build_core import build as scikit_build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ConfigSettings = dict[str, str | list[str]] | None

# One release for all: the kernels are tuned on the code this compiler generates.
CUDA_WHEELS = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",  # the optimiser nvcc runs
    "nvidia-cuda-crt==13.0.*",  # headers that every CUDA source includes
    "nvidia-cuda-runtime==13.0.*",  # headers, libcudart_static
    "nvidia-cuda-cccl==13.0.*",  # nv/target, which cuda_fp8.h and cuda_bf16.h include
]
MINIMUM_NVCC = (13, 0)  # the oldest that was tried


def _cuda_is_off(config_settings: ConfigSettings) -> bool:
    value = (config_settings or {}).get("cmake.define.MEGAMOE_CUDA", "ON")
    return str(value).upper() in ("OFF", "0", "FALSE", "NO")


def _is_recent(nvcc: Path) -> bool:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    release = re.search(r"release (\d+)\.(\d+)", text)
    return release is not None and (int(release[1]), int(release[2])) >= MINIMUM_NVCC


def _machine_nvcc() -> Path | None:
    # What CUDACXX names is the caller's decision and is not judged.
    if compiler := os.environ.get("CUDACXX"):
        return Path(compiler)
    toolkits = [root for key in ("CUDA_HOME", "CUDA_PATH") if (root := os.environ.get(key))]
    candidates = [shutil.which("nvcc"), *(os.path.join(root, "bin", "nvcc") for root in toolkits)]
    found = (Path(path) for path in candidates if path and os.access(path, os.X_OK))
    return next((nvcc for nvcc in found if _is_recent(nvcc)), None)


def _wheel_nvcc() -> Path | None:
    try:
        spec = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        return None
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    # JAX's own CUDA wheels put parts of a toolkit into the same folder: only a whole one compiles.
    wanted = ("bin/nvcc", "include/cuda_runtime.h", "include/crt/host_defines.h", "lib/libcudart_static.a")
    return next((root / "bin/nvcc" for root in roots if all((root / part).exists() for part in wanted)), None)


def _requires(base: list[str], config_settings: ConfigSettings) -> list[str]:
    if _cuda_is_off(config_settings) or _machine_nvcc() is not None:
        return base
    return base + CUDA_WHEELS


def _choose_compiler(config_settings: ConfigSettings) -> None:
    if _cuda_is_off(config_settings):
        return
    nvcc = _machine_nvcc() or _wheel_nvcc()
    if nvcc is None:
        version = ".".join(map(str, MINIMUM_NVCC))
        raise SystemExit(
            f"jax_megamoe: no nvcc of CUDA {version} or newer on PATH, in CUDA_HOME or in the build environment: "
            "install a CUDA toolkit, build with pip's build isolation (which fetches one as wheels), or pass "
            "-C cmake.define.MEGAMOE_CUDA=OFF for a build without the GPU kernels."
        )
    os.environ["CUDACXX"] = str(nvcc)


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """Requirements of a wheel build, with the CUDA compiler where the machine has none."""
    return _requires(scikit_build.get_requires_for_build_wheel(config_settings), config_settings)


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    """Requirements of an editable build, with the CUDA compiler where the machine has none."""
    return _requires(scikit_build.get_requires_for_build_editable(config_settings), config_settings)


def build_wheel(directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None) -> str:
    """Builds the wheel with the compiler that was found."""
    _choose_compiler(config_settings)
    return scikit_build.build_wheel(directory, config_settings, metadata_directory)


def build_editable(
    directory: str, config_settings: ConfigSettings = None, metadata_directory: str | None = None
) -> str:
    """Builds the editable wheel with the compiler that was found."""
    _choose_compiler(config_settings)
    return scikit_build.build_editable(directory, config_settings, metadata_directory)
