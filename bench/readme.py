"""`python -m bench readme`: puts the tables of README.md and docs/performance.md in from `bench/results/current`."""

import argparse
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from bench import records

ROOT = pathlib.Path(__file__).parent.parent
CURRENT = ROOT / "bench" / "results" / "current"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
SHAPES = {"flash": "Flash", "pro": "Pro"}
Row = dict[str, Any]
# A cell of a row, from all rows of the table's shape with as many tokens, by format.
Cell = Callable[[dict[str, Row]], float | None]


class Column(NamedTuple):
    """One column for each shape: its title, its cells, and how many digits follow the point (None: of a time).

    Tables leave out a column that has no cells.
    """

    title: str
    cell: Cell
    digits: int | None = None


class Table(NamedTuple):
    """A table of one commit: the files that have its rows, what wrote them, which numbers of tokens it shows."""

    files: tuple[str, ...]
    command: str
    columns: tuple[Column, ...]
    least: int = 1
    most: int = 8192


def _of(*keys: str, format: str = "fp8_block") -> Cell:
    """The value below these keys of a row, if it has one."""

    def cell(rows: dict[str, Row]) -> float | None:
        value: Any = rows.get(format)
        for key in keys:
            value = value.get(key) if value is not None else None
        return value

    return cell


def _quotient(above: Cell, below: Cell) -> Cell:
    def cell(rows: dict[str, Row]) -> float | None:
        first, second = above(rows), below(rows)
        return None if first is None or second is None else first / second

    return cell


def _rival_us(rows: dict[str, Row]) -> float | None:
    row = rows.get("fp8_block")
    return None if row is None else records.rival_us(row)


US = Column("us", _of("us"))
RIVAL = Column("rival", _rival_us)
FLOOR = Column("over the floor", _of("ratio"), 2)
MXFP4 = (
    Column("us", _of("us", format="mxfp4")),
    Column("over its floor", _of("ratio", format="mxfp4"), 2),
    Column("times as fast as FP8", _quotient(_of("us"), _of("us", format="mxfp4")), 2),
)
RANKS = (Column("one kernel", _of("us")), Column("collectives", _of("collective_us")), RIVAL)
ONE_H200 = ("h200-2026-11-30-2ca5d4c-flash.json", "h200-2026-11-30-2ca5d4c-pro.json")
ONE_H200_COMMAND = "python -m bench --weights all --rivals"
# After the kernels of MXFP4 alone were changed.
MXFP4_H200 = ("h200-2026-12-01-b0f2186-flash.json", "h200-2026-12-01-b0f2186-pro.json")
MXFP4_H200_COMMAND = "python -m bench --weights fp8_block,mxfp4"
TABLES = {
    "few": Table(ONE_H200, ONE_H200_COMMAND, (US, FLOOR), most=256),
    "many": Table(ONE_H200, ONE_H200_COMMAND, (US,), least=512),
    "h100": Table(
        (
            "h100-2026-11-26-677e921.json",
            "h100-2026-11-26-677e921-rivals-flash.json",
            "h100-2026-11-26-677e921-rivals-pro.json",
        ),
        "python -m bench`, from 256 tokens on with `--rivals",
        (US, FLOOR),
    ),
    "rivals": Table(ONE_H200, ONE_H200_COMMAND, (US, RIVAL)),
    "jax": Table(
        ("h200-2026-11-24-c1fa5d4-alternatives.json",),
        "python -m bench --alternatives",
        (
            US,
            Column("ragged_dot", _of("ragged_us")),
            Column("times as fast", _quotient(_of("ragged_us"), _of("us")), 1),
        ),
    ),
    "mxfp4-few": Table(MXFP4_H200, MXFP4_H200_COMMAND, MXFP4, most=128),
    "mxfp4-many": Table(MXFP4_H200, MXFP4_H200_COMMAND, MXFP4, least=256),
    "two-h200": Table(("h200x2-2026-11-30-2ca5d4c-ranks.json",), "python -m bench ranks --rivals", RANKS),
    "two-h100": Table(("h100x2-2026-11-25-2a17533-ranks.json",), "python -m bench ranks", RANKS),
}


def main(arguments: list[str]) -> int:
    """Puts the tables into the pages; with --check only says which pages are not up to date."""
    parser = argparse.ArgumentParser(prog="python -m bench readme", description=main.__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    stale = []
    for page in PAGES:
        text = page.read_text()
        rendered = render(text)
        if rendered != text:
            stale.append(page.relative_to(ROOT))
            if not options.check:
                page.write_text(rendered)
    for name in stale:
        print(f"{name}: " + ("is not what `python -m bench readme` makes of it" if options.check else "rendered"))
    return int(options.check and bool(stale))


def render(text: str) -> str:
    """A page with its tables as the result files have them now; `ValueError` for a table that nobody described."""

    def table(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise ValueError(f"the page has a table {found[1]!r}, wanted one of {', '.join(TABLES)}")
        return f"<!-- table {found[1]} -->\n{lines_of(TABLES[found[1]])}\n<!-- end of the table -->"

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end of the table -->", table, text, flags=re.DOTALL)


def lines_of(table: Table) -> str:
    """The table in Markdown: what it was measured on above its rows."""
    results = results_of(table)
    first = results[0]
    if len({(result["commit"], result["device"]) for result in results}) > 1:
        raise ValueError(f"{', '.join(table.files)} are of several commits or devices, wanted a table of one")
    rivals = {records.rival_name(result) for result in results}
    if RIVAL in table.columns and len(rivals) > 1:
        raise ValueError(f"{', '.join(table.files)} have {' and '.join(sorted(rivals))}, wanted a table of one rival")
    rows = rows_of(table)
    columns = [column for column in table.columns if any(any(_cells(column, row)) for row in rows.values())]
    about = f"{first['device'].removeprefix('NVIDIA ')}, {first['date']}, commit {first['commit']}"
    about += f", `{table.command}`" if table.command else ""
    about += f", the rival is {records.rival_name(first)}" if RIVAL in columns else ""
    titles = [f"{shape}, {column.title}" for shape in SHAPES.values() for column in columns]
    return "\n".join(
        [
            f"{about}:",
            "",
            f"| tokens | {' | '.join(titles)} |",
            "| --- " * (1 + len(titles)) + "|",
            *(f"| {tokens} | {' | '.join(_line(columns, row))} |" for tokens, row in rows.items()),
        ]
    )


def results_of(table: Table) -> list[dict[str, Any]]:
    """The contents of the table's files."""
    return [records.read(CURRENT / name) for name in table.files]


def rows_of(table: Table) -> dict[int, dict[str, dict[str, Row]]]:
    """Rows of all files by tokens, shape and format. The first file that has a row counts."""
    found: dict[int, dict[str, dict[str, Row]]] = {}
    for result in results_of(table):
        for shape in SHAPES:
            for row in result["shapes"].get(shape, []):
                if table.least <= row["tokens"] <= table.most and row["routing"] == "uniform":
                    found.setdefault(row["tokens"], {}).setdefault(shape, {}).setdefault(row["format"], row)
    return dict(sorted(found.items()))


def _line(columns: list[Column], rows: dict[str, dict[str, Row]]) -> list[str]:
    cells = [_cells(column, rows) for column in columns]
    return [cell for of_shape in zip(*cells, strict=True) for cell in of_shape]


def _cells(column: Column, rows: dict[str, dict[str, Row]]) -> list[str]:
    """A column's cell of each shape."""
    return [_text(column.cell(rows.get(shape, {})), column.digits) for shape in SHAPES]


def _text(value: float | None, digits: int | None) -> str:
    if value is None:
        return ""
    return f"{value:.{int(value < 100) if digits is None else digits}f}"
