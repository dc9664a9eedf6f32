"""Result files: what they say of the machine, and reading them, older ones too."""

import json
import pathlib
from typing import Any

from bench.rival import PACKAGE
from jax_megamoe import provenance


def describe(commit: str | None, method: str) -> dict[str, Any]:
    """What the figures were measured on and with, and how; starts JAX."""
    return {**provenance.describe(commit), "method": method}


def read(path: pathlib.Path) -> dict[str, Any]:
    """A result file of `python -m bench`; `ValueError` for other files."""
    result = json.loads(path.read_text())
    if isinstance(result, dict) and "rows" in result:  # As `python -m bench ranks` has them.
        result["shapes"] = result["rows"]
    if not isinstance(result, dict) or "shapes" not in result:
        raise ValueError(f"{path} holds no shapes, wanted a file that `python -m bench --output` wrote")
    for rows in result["shapes"].values():
        for row in rows:
            # Until rows named them, a file had one kind of routing, and there was one format of weights.
            row.setdefault("routing", result.get("routing", "uniform"))
            row.setdefault("format", "fp8_block")
            _name_the_rival(row)
    return result


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes a result file."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def label(name: str, routing: str, format: str = "fp8_block") -> str:
    """A shape, its routing and the format of its weights in a title; the latter two only where not the usual ones."""
    return ", ".join([name, *([routing] if routing != "uniform" else []), *([format] if format != "fp8_block" else [])])


def rival_name(result: dict[str, Any]) -> str:
    """The rival of a result and its version; the latter only where it is known."""
    version = result.get("rivals", {}).get(PACKAGE)
    return PACKAGE if version is None else f"{PACKAGE} {version}"


def rival_us(row: dict[str, Any]) -> float | None:
    """The rival's time in a row; None where it has none, or computed something else."""
    rival = row.get("rival", {})
    us: float | None = None if "error" in rival else rival.get("us")
    return us


def _name_the_rival(row: dict[str, Any]) -> None:
    """Older files call the rival a peer: here it gets the name that it has now."""
    for old, new in (("peer", "rival"), ("ours_over_peer", "ours_over_rival")):
        if old in row:
            row[new] = row.pop(old)
    if "winner" in row:
        row["winner"] = row["winner"].replace("peer", "rival")
