"""The tables that a run prints."""

from typing import Any

INSTALL = "pip install sgl-deep-gemm==0.1.4.post1 apache-tvm-ffi==0.1.11, beside a torch for CUDA 13"
COLUMNS = ("routing", "tokens", "touched", "us", "ceiling_us", "ratio", "gb_per_s", "tflop_per_s", "diff", "captured")
ALTERNATIVES = ("reference_us", "ragged_us", "dense_us")
RIVALS = ("routing", "tokens", "us", "ratio", "peer us", "peer ratio", "peer diff", "ours/peer")


def print_header(title: str, alternatives: bool) -> None:
    """Above a shape's rows."""
    print(f"\n{title}\n{_line(_columns(alternatives))}")


def print_row(row: dict[str, Any], alternatives: bool) -> None:
    """A row as it was measured."""
    print(_line(row.get(column) for column in _columns(alternatives)), flush=True)


def print_rivals(name: str, rows: list[dict[str, Any]], alternatives: bool) -> None:
    """Who wins, row by row, and below why a column is empty."""
    columns = (*RIVALS, *(ALTERNATIVES if alternatives else ()), "winner")
    print(f"\n{name}: ours and the rivals\n{_line(columns)}")
    errors: list[str] = []
    for row in rows:
        peer = row.get("peer", {})
        cells = {**row, "ours/peer": row.get("ours_over_peer"), "peer us": peer.get("us")}
        cells |= {f"peer {key}": peer.get(key) for key in ("ratio", "diff")}
        if "error" in peer:
            cells["peer us"] = "absent" if "not installed" in peer["error"] else "failed"
            errors.append(peer["error"].strip().splitlines()[-1])
        print(_line(cells.get(column) for column in columns), flush=True)
    for error in dict.fromkeys(errors):
        print(f"The peer has no figure: {error}" + (f" ({INSTALL})" if "not installed" in error else ""))


def text(value: Any) -> str:
    """A cell of the table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(alternatives: bool) -> tuple[str, ...]:
    return (*COLUMNS, *(ALTERNATIVES if alternatives else ()))


def _line(cells: Any) -> str:
    return " ".join(f"{text(cell):>12}" for cell in cells)
