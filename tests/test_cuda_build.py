"""What the CUDA compiler made of the kernels, read out of the built module: no GPU needed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from jax_megamoe.errors import MegaMoEError
from jax_megamoe.primitives import _library
from tests.support.skips import why_no_cuda_build

CUDA_SOURCES = Path(__file__).parent.parent / "jax_megamoe" / "cuda"
# What CMakeLists.txt takes CUDA sources from; with MEGAMOE_TESTING, what only tests and benchmarks call too.
COMPILED = ("instantiations/moe_*.cu", "router/*.cu", "transport/*.cu", "diagnostics/*.cu")
COMPILED_FOR_TESTING = ("instantiations/virtual_ranks_*.cu", "testing/*.cu")
TARGETS = {"jax_megamoe.moe.v1", "jax_megamoe.moe_peers.v3", "jax_megamoe.route.v1", "jax_megamoe.wire_test.v1"}
TARGETS_FOR_TESTING = {"jax_megamoe.virtual_ranks.v1", "jax_megamoe.read_ceiling.v1"}


@dataclass(frozen=True)
class Kernel:
    """One compiled function and what it needs per thread."""

    name: str
    registers: int
    stack_bytes: int
    local_bytes: int


@cache
def module() -> Any:
    if reason := why_no_cuda_build():
        pytest.skip(reason)
    return importlib.import_module("jax_megamoe._core")


def module_path() -> Path:
    return Path(module().__file__)


def sources_of(patterns: tuple[str, ...]) -> set[str]:
    return {source.stem for pattern in patterns for source in CUDA_SOURCES.glob(pattern)}


@cache
def cuobjdump_path() -> Path:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root) / "cu13" / "bin" for root in (spec.submodule_search_locations or [] if spec else [])]
    folders += [Path(root) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if (root := os.environ.get(key))]
    if found := shutil.which("cuobjdump"):
        folders.append(Path(found).parent)
    for folder in folders:
        # It prints instructions only with nvdisasm beside it.
        if all(os.access(folder / tool, os.X_OK) for tool in ("cuobjdump", "nvdisasm")):
            return folder / "cuobjdump"
    pytest.fail("no cuobjdump with nvdisasm beside it: install the extra `test` or a CUDA toolkit")


@cache
def dump(option: str) -> str:
    return subprocess.run([cuobjdump_path(), option, module_path()], capture_output=True, text=True, check=True).stdout


@cache
def kernels() -> list[Kernel]:
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    found = re.findall(pattern, dump("--dump-resource-usage"))
    return [Kernel(name, int(registers), int(stack), int(local)) for name, registers, stack, local in found]


@cache
def instructions() -> dict[str, set[str]]:
    """Opcodes with their modifiers, for each function."""
    parts = re.split(r"Function : (\S+)", dump("--dump-sass"))
    opcode = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)")
    return {name: set(opcode.findall(text)) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def fused_kernels() -> dict[str, set[str]]:
    found = {name: opcodes for name, opcodes in instructions().items() if "moe_sm90" in name}
    assert found, f"no fused kernel among {sorted(instructions())}"
    return found


def sass_of_kernels() -> list[tuple[str, str]]:
    """Each kernel's name and machine code."""
    parts = re.split(r"Function : (\S+)", dump("--dump-sass"))
    return list(zip(parts[1::2], parts[2::2], strict=True))


def test_every_source_is_compiled_for_sm_90a_only():
    compiled = set(re.findall(r"ELF file\s+\d+: (\S+)\.(sm_\w+)\.cubin", dump("--list-elf")))
    sources = sources_of(COMPILED) | (sources_of(COMPILED_FOR_TESTING) if module().has_testing else set())
    assert sources, f"no CUDA sources under {CUDA_SOURCES}"
    assert compiled == {(source, "sm_90a") for source in sources}


def test_no_source_is_forgotten():
    assert sources_of(COMPILED) | sources_of(COMPILED_FOR_TESTING) == sources_of(("**/*.cu",))
    build = (CUDA_SOURCES / "CMakeLists.txt").read_text()
    assert all(pattern in build for pattern in (*COMPILED, *COMPILED_FOR_TESTING))


def test_only_a_build_for_testing_has_what_users_do_not_call():
    core = module()
    assert set(core.ffi_registrations()["targets"]) == TARGETS | (TARGETS_FOR_TESTING if core.has_testing else set())
    assert hasattr(core, "hold_sms") == core.has_testing
    assert any("moe_virtual_ranks" in kernel.name for kernel in kernels()) == core.has_testing


def test_editable_installs_are_for_testing_and_wheels_are_not():
    settings = tomllib.loads((CUDA_SOURCES.parent.parent / "pyproject.toml").read_text())["tool"]["scikit-build"]
    (override,) = settings["overrides"]
    assert override == {"if": {"state": "editable"}, "cmake": {"define": {"MEGAMOE_TESTING": "ON"}}}
    assert "define" not in settings["cmake"]
    option = re.search(r"option\(MEGAMOE_TESTING\s+\"[^\"]*\" (\w+)\)", (CUDA_SOURCES / "CMakeLists.txt").read_text())
    assert option is not None and option[1] == "OFF"


def test_the_product_does_not_use_what_is_for_testing():
    for source in CUDA_SOURCES.rglob("*"):
        if source.suffix in (".h", ".cc", ".cu", ".cuh") and source.parent.name != "testing":
            # bindings.cc registers it, under the same condition.
            code = re.sub(r"#ifdef MEGAMOE_TESTING.*?#endif", "", source.read_text(), flags=re.DOTALL)
            assert '"testing/' not in code, source


def test_what_misses_it_says_so(monkeypatch):
    monkeypatch.setattr(_library, "_core", types.SimpleNamespace(has_cuda=True, has_testing=False))
    with pytest.raises(MegaMoEError, match=r"built without what only tests and .*MEGAMOE_TESTING=ON`\.$"):
        _library.check_testing_available()
    monkeypatch.setattr(_library, "_core", types.SimpleNamespace(has_cuda=True, has_testing=True))
    _library.check_testing_available()


def test_no_kernel_spills_registers():
    assert kernels(), "cuobjdump listed no kernels"
    # Spilled registers live on the stack, and so do arrays with computed indices: both are slow, neither is wanted. Virtual
    # ranks, which only tests run, find their arguments by a computed index.
    spilling = [kernel for kernel in kernels() if kernel.stack_bytes or kernel.local_bytes]
    assert [kernel for kernel in spilling if "moe_virtual_ranks" not in kernel.name] == []


def test_fused_kernels_multiply_fp8_on_the_tensor_cores():
    for name, opcodes in fused_kernels().items():
        multiplies = {opcode for opcode in opcodes if opcode.startswith("QGMMA")}
        assert multiplies, f"{name} holds no FP8 WGMMA"
        types = ".F32.E4M3.E4M3"
        if "Mxfp4" in name:  # decoded; in the normal orientation weights are the second operand
            types = ".F32.E4M3.E5M2" if "Normal" in name else ".F32.E5M2.E4M3"
        assert all(opcode.endswith(types) for opcode in multiplies), f"{name}: {sorted(multiplies)}"


def test_swapab_has_mxfp4_weights_from_registers():
    found = set()
    for name, text in sass_of_kernels():
        if "moe_sm90" in name or "moe_virtual_ranks" in name:
            multiplies = re.findall(r"QGMMA\S* R\d+, (R\d+|gdesc)", text)
            from_registers = "Mxfp4" in name and "Normal" not in name
            assert multiplies and {"R" if a[0] == "R" else a for a in multiplies} == (
                {"R"} if from_registers else {"gdesc"}
            ), name
            found.add(from_registers)
    assert found == {True, False}


def test_fused_kernels_load_weights_by_bulk_copies():
    for name, opcodes in fused_kernels().items():
        assert any(opcode.startswith("UBLKCP") for opcode in opcodes), f"{name} holds no bulk copy"


def test_multiplies_stay_in_flight():
    # Where ptxas gives up on that (its remarks C7510 to C7518), it puts a wait behind every single multiply.
    for name, text in sass_of_kernels():
        if "moe_sm90" in name:
            assert text.count("QGMMA") >= 2 * text.count("WARPGROUP.DEPBAR"), name
