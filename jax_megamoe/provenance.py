"""What a measurement was made on and with, for the files that keep its result."""

import datetime
import os
import pathlib
import subprocess
from typing import Any

import jax
import jaxlib


def describe(commit: str | None = None) -> dict[str, Any]:
    """Device, driver, versions, commit, date and XLA's flags; starts JAX.

    `commit` None is that of the checkout which holds this package, "unknown" where it is in none.
    """
    return {
        "device": jax.devices()[0].device_kind,
        "driver": _driver() if jax.default_backend() == "gpu" else "",
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "commit": commit or _commit() or "unknown",
        "date": datetime.date.today().isoformat(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _driver() -> str:
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return ", ".join(dict.fromkeys(versions.splitlines()))  # one for each GPU, as a rule the same


def _commit() -> str:
    here = pathlib.Path(__file__)
    # An installed copy may lie inside the checkout of something else.
    is_tracked = _output("git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name)
    return _output("git", "-C", str(here.parent), "rev-parse", "--short", "HEAD") if is_tracked else ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
