"""The report as lines to read."""

from jax_megamoe.doctor.check import LIMIT
from jax_megamoe.doctor.facts import Device, Facts
from jax_megamoe.doctor.verdict import Report


def lines_of(report: Report) -> list[str]:
    """What the command prints without `--json`."""
    facts = report.facts
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
        ("module", f"jax_megamoe._core is {facts.module}"),
        ("FFI", ", ".join(f"{name} {version}" for name, version in facts.ffi_versions.items())),
        ("handlers", ", ".join(facts.ffi_targets) or "none"),
        *_devices(facts),
        ("NCCL", facts.nccl or "not installed as a package"),
        ("XLA_FLAGS", facts.xla_flags or "not set"),
        ("recommended", facts.recommended_xla_flags + _about_flags(facts)),
        *((name, value) for name, value in facts.environment.items()),
        ("moe", f"implementation=None is {report.implementation!r}: {report.why}"),
        ("check", _check(report)),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"problem: {problem}" for problem in report.problems]
    return [*lines, "All is well." if report.is_well else f"{len(report.problems)} problem(s)."]


def _devices(facts: Facts) -> list[tuple[str, str]]:
    rows = [
        (
            "GPU",
            f"{gpu.name} at {gpu.bus_id}, SM {gpu.compute_capability}, driver {gpu.driver}, "
            f"{gpu.free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free",
        )
        for gpu in facts.gpus
    ]
    rows += [("JAX", "does not start")] if facts.backend is None else []
    counted = {_device(device): facts.devices.count(device) for device in facts.devices}
    rows += [("JAX", f"{count} x {text}" if count > 1 else text) for text, count in counted.items()]
    if len(facts.peer_access) > 1:
        rows.append(("peer access", _access(facts.peer_access)))
    return rows


def _device(device: Device) -> str:
    text = f"{device.kind} ({device.platform})"
    if device.bus_id is not None:
        text += f" at {device.bus_id}"
    if device.xla_bytes is not None:
        text += f", {device.xla_bytes / 1e9:.1f} GB for XLA"
    if device.bytes_beside_xla is not None:
        text += f", {device.bytes_beside_xla / 1e9:.1f} GB left for buffers that ranks share"
    return text


def _about_flags(facts: Facts) -> str:
    if not facts.missing_xla_flags:
        return " (set)"
    return "" if facts.backend == "gpu" else " (for loops on GPUs)"


def _access(rows: list[list[bool]]) -> str:
    missing = [
        f"{one} has none to {other}"
        for one, row in enumerate(rows)
        for other, reaches in enumerate(row)
        if one != other and not reaches
    ]
    return ", ".join(missing) or f"all {len(rows)} GPUs reach each other's memory"


def _check(report: Report) -> str:
    check = report.check
    if check is None:
        return "not run"
    if check.difference is None:
        return f"no result after {check.seconds:.1f} s"
    devices = f"{check.num_devices} devices" if check.num_devices > 1 else "one device"
    return (
        f"a tiny layer on {devices} differs from float32 by {check.difference:.1e} "
        f"(allowed: {LIMIT:.1e}; {check.seconds:.1f} s)"
    )
