"""The tables that a run prints."""

from typing import Any

from bench.rival import INSTALL
from bench.timing import Timing

COLUMNS = (
    "format",
    "routing",
    "tokens",
    "touched",
    "us",
    "ceiling_us",
    "ratio",
    "gb_per_s",
    "tflop_per_s",
    "diff",
    "captured",
)
ALTERNATIVES = ("reference_us", "ragged_us", "dense_us")
INVARIANT = ("invariant_us", "invariant/us")  # with `batch_invariant`, and over the time without it
RIVALS = ("format", "routing", "tokens", "us", "ratio", "rival us", "rival ratio", "rival diff", "ours/rival")
RIVALS_OF_RANKS = ("ranks", "tokens", "routing", "us", "collective_us", "rival us", "diff to ours", "ours/rival")


def print_header(title: str, alternatives: bool, batch_invariant: bool) -> None:
    """Above a shape's rows."""
    print(f"\n{title}\n{_line(_columns(alternatives, batch_invariant))}")


def print_row(row: dict[str, Any], alternatives: bool, batch_invariant: bool) -> None:
    """A row as it was measured."""
    cells = {**row, "invariant/us": row["invariant_us"] / row["us"]} if batch_invariant else row
    print(_line(cells.get(column) for column in _columns(alternatives, batch_invariant)), flush=True)


def print_rivals(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Who wins, row by row, and below why a column is empty."""
    columns = (*columns, "winner")
    print(f"\n{title}\n{_line(columns)}")
    errors: list[str] = []
    for row in rows:
        rival = row.get("rival", {})
        cells = {**row, "ours/rival": row.get("ours_over_rival"), "rival us": rival.get("us")}
        cells |= {"rival ratio": rival.get("ratio"), "rival diff": rival.get("diff")}
        cells["diff to ours"] = rival.get("diff_to_ours")
        if "error" in rival:
            cells["rival us"] = "absent" if "not installed" in rival["error"] else "failed"
            errors.append(rival["error"].strip().splitlines()[-1])
        print(_line(cells.get(column) for column in columns), flush=True)
    for error in dict.fromkeys(errors):
        print(f"The rival has no figure: {error}" + (f" ({INSTALL})" if "not installed" in error else ""))


def winner(row: dict[str, Any]) -> str:
    """Who took least time in a row: ours, another one, or both where their runs overlap."""
    times = {"ours": Timing(row["us"], row["us_least"], row["us_most"])}
    rival = row.get("rival", {"error": "not asked for"})
    if "error" not in rival:
        times["rival"] = Timing(rival["us"], rival["us_least"], rival["us_most"])
    for name in ("ragged", "dense", "reference"):
        if f"{name}_us" in row:
            times[name] = Timing(*[row[f"{name}_us"]] * 3)
    if len(times) == 1:
        return "-"
    order = sorted(times, key=lambda name: times[name].us)
    first, second = times[order[0]], times[order[1]]
    return f"{order[0]} or {order[1]}" if second.us_least <= first.us_most else order[0]


def text(value: Any) -> str:
    """A cell of the table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(alternatives: bool, batch_invariant: bool) -> tuple[str, ...]:
    return (*COLUMNS, *(INVARIANT if batch_invariant else ()), *(ALTERNATIVES if alternatives else ()))


def _line(cells: Any) -> str:
    return " ".join(f"{text(cell):>12}" for cell in cells)
