"""Result files: what they say of the machine, and reading them, older ones too."""

import datetime
import json
import os
import pathlib
import subprocess
from typing import Any

import jax
import jaxlib


def describe(commit: str | None, method: str) -> dict[str, Any]:
    """What the figures were measured on and with, and how; starts JAX."""
    if commit is None:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or "unknown"
    driver = ""
    if jax.default_backend() == "gpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": jax.devices()[0].device_kind,
        "driver": driver,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "method": method,
    }


def read(path: pathlib.Path) -> dict[str, Any]:
    """A result file of `python -m bench`; `ValueError` for other files."""
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or "shapes" not in result:
        raise ValueError(f"{path} holds no shapes, wanted a file that `python -m bench --output` wrote")
    for rows in result["shapes"].values():
        for row in rows:
            # Until rows named it, a file had one kind of routing.
            row.setdefault("routing", result.get("routing", "uniform"))
    return result


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes a result file."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def label(name: str, routing: str) -> str:
    """A shape and its routing in a title; the latter only where it is not the usual one."""
    return name if routing == "uniform" else f"{name}, {routing}"
