"""`python -m bench compare A B`: what changed between two result files."""

from typing import Any

from bench.records import label


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The rows that both results have, the later time over the earlier one, and whether their runs overlap."""
    lines = [f"{before['device']} {before['commit']} -> {after['device']} {after['commit']}"]
    if before["device"] != after["device"]:
        lines.append("Two kinds of device: the differences are not those of the code.")
    for name, rows in after["shapes"].items():
        earlier = {_key(row): row for row in before["shapes"].get(name, [])}
        for row in rows:
            old = earlier.get(_key(row))
            if old is None:
                continue
            title = f"{label(name, *_key(row)[1:])} {row['tokens']:>5} tokens"
            lines.append(f"{title}: {_change(old, row)}")
            rivals = [side.get("rival", {"error": ""}) for side in (old, row)]
            if not any("error" in rival for rival in rivals):
                lines.append(f"{title}, rival: {_change(*rivals)}")
    return lines if len(lines) > 1 else [*lines, "The files have no rows in common."]


def _key(row: dict[str, Any]) -> tuple[int, str, str]:
    return row["tokens"], row.get("routing", "uniform"), row.get("format", "fp8_block")


def _change(old: dict[str, Any], new: dict[str, Any]) -> str:
    overlap = old["us_least"] <= new["us_most"] and new["us_least"] <= old["us_most"]
    within = " (within the spread)" if overlap else ""
    return f"{old['us']:.1f} -> {new['us']:.1f} us, x{new['us'] / old['us']:.3f}{within}"
