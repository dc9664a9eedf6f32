"""What the facts and the check mean: how `moe` will run here and why, what is wrong, and what is worth knowing."""

import re
from dataclasses import dataclass

from jax_megamoe.doctor.check import LIMIT, Check
from jax_megamoe.doctor.facts import Facts

# Of builds with CUDA 13, which are the default (docs/building.md).
_OLDEST_DRIVER = 580
# From this jax on, XLA's own collectives between GPUs call what NCCL has since then; with an older one they fail, and
# pip does not mind (docs/building.md).
_JAX_OF_NEW_NCCL = (0, 12)
_OLDEST_NCCL = (2, 29, 2)
# Buffers of ranks that decode take tens to hundreds of MiB (docs/expert-parallel.md).
_LITTLE_BYTES = 1 << 30


@dataclass(frozen=True)
class Report:
    """The facts and the verdict. `problems` make an exit status of 1, `notes` do not."""

    is_well: bool
    implementation: str  # what `implementation=None` is here: "cuda", "collective", "reference", or "none"
    why: str
    problems: list[str]
    notes: list[str]
    check: Check | None  # None where JAX does not start
    facts: Facts


def judge(facts: Facts, check: Check | None) -> Report:
    """The verdict; asks nothing but its arguments."""
    implementation, why = choose(facts)
    problems = _problems(facts, check)
    return Report(not problems, implementation, why, problems, _notes(facts), check, facts)


def choose(facts: Facts) -> tuple[str, str]:
    """What `moe` with `implementation=None` will be, and why."""
    if facts.backend is None:
        return "none", "JAX does not start"
    if facts.backend == "cpu":
        return "reference", "JAX's default backend is the CPU"
    if facts.backend != "gpu":
        return "none", f"JAX's default backend is {facts.backend}, and moe runs on Hopper GPUs and CPUs"
    if facts.why_no_kernel is not None:
        return "none", facts.why_no_kernel
    count = len(facts.devices)
    if count == 1:
        return "cuda", "the GPU is a Hopper, and the module has its kernel"
    if facts.why_no_group is not None:
        return "collective", f"one kernel on each GPU, and XLA's collectives between them: {facts.why_no_group}"
    return "cuda", f"one kernel over all {count} GPUs of this process, which reach each other's memory"


def _problems(facts: Facts, check: Check | None) -> list[str]:
    if check is None:
        return [
            f"JAX does not start ({facts.backend_error}): unset JAX_PLATFORMS, or install what it names, "
            "for GPUs by pip install 'jax[cuda13]'."
        ]
    found = []
    if facts.why_no_kernel is not None:
        found.append(facts.why_no_kernel)
    elif check.error is not None:
        found.append(f"a tiny layer failed: {check.error}")
    # Written so that NaN is one, too.
    elif check.difference is None or not check.difference <= LIMIT:
        found.append(f"a tiny layer differs from float32 by {check.difference}, wanted at most {LIMIT}: report it.")
    if found and facts.backend == "gpu" and (driver := _old_driver(facts)):
        found.append(driver)
    if nccl := _old_nccl(facts):
        found.append(nccl)
    if facts.backend == "cpu" and facts.gpus and not _asked_for_cpu(facts):
        found.append(
            f"this machine has {len(facts.gpus)} x {facts.gpus[0].name}, and JAX runs on the CPU: "
            "pip install 'jax[cuda13]', and look into what JAX logs when it starts."
        )
    return found


def _notes(facts: Facts) -> list[str]:
    notes = []
    if facts.passed_over and facts.why_no_kernel is None:
        here, installed = facts.passed_over
        notes.append(
            f"the package that is installed in {installed} is not the one that was tried: start Python in another "
            f"folder than {here}, whose Python files come before it."
        )
    if facts.backend == "gpu" and facts.missing_xla_flags:
        notes.append(
            f"for jax.lax.while_loop set XLA_FLAGS='{facts.missing_xla_flags}' (jax_megamoe.recommended_xla_flags)."
        )
    if facts.backend == "cpu" and facts.gpus and _asked_for_cpu(facts):
        notes.append(f"JAX_PLATFORMS keeps JAX from {len(facts.gpus)} x {facts.gpus[0].name}.")
    left = [device.bytes_beside_xla for device in facts.devices if device.bytes_beside_xla is not None]
    if len(facts.devices) > 1 and left and min(left) < _LITTLE_BYTES:
        notes.append(
            f"only {min(left) / 1e9:.2f} GB are left beside XLA's memory for buffers that ranks share: lower "
            "XLA_PYTHON_CLIENT_MEM_FRACTION (jax_megamoe.expert_parallel.buffer_bytes says how much they take)."
        )
    return notes


def _asked_for_cpu(facts: Facts) -> bool:
    platforms = facts.environment.get("JAX_PLATFORMS", "")
    # An empty list hides the GPUs as well.
    return facts.environment.get("CUDA_VISIBLE_DEVICES") == "" or bool(
        platforms and not {"cuda", "gpu"} & set(platforms.split(","))
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _old_nccl(facts: Facts) -> str | None:
    if facts.backend != "gpu" or len(facts.devices) < 2 or facts.nccl is None:
        return None
    jax_version = facts.versions["jax"]
    if _numbers(jax_version) < _JAX_OF_NEW_NCCL or _numbers(facts.nccl) >= _OLDEST_NCCL:
        return None
    return (
        f"NCCL is {facts.nccl}, wanted {'.'.join(map(str, _OLDEST_NCCL))} or newer for XLA's collectives of jax "
        f"{jax_version}: "
        "pip install --upgrade nvidia-nccl-cu13."
    )


def _old_driver(facts: Facts) -> str | None:
    drivers = {gpu.driver for gpu in facts.gpus}
    old = [
        driver for driver in drivers if driver.split(".")[0].isdigit() and int(driver.split(".")[0]) < _OLDEST_DRIVER
    ]
    if not old:
        return None
    return (
        f"the driver is {old[0]}, wanted {_OLDEST_DRIVER} or newer for a build with CUDA 13: update it, or build with "
        "a toolkit of CUDA 12 (docs/building.md)."
    )
