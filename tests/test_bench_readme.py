"""Pages that show figures: they are what `python -m bench readme` and `plot` make of `bench/results/current`."""

import json
import re

import pytest

from bench import floor_figure, plot, readme, records
from bench.__main__ import main
from bench.compare import compare
from tests.support.bench_cases import row_of


def test_committed_files_can_be_read():
    results = [records.read(path) for path in sorted(readme.CURRENT.glob("*.json"))]
    assert len(results) >= 9
    rows = [row for result in results for rows in result["shapes"].values() for row in rows]
    assert not any("peer" in row or "peer" in row.get("winner", "") for row in rows)
    for result in results:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"]) and result["device"] and result["commit"]
        assert plot.panels([result])
        # What was typed in from a table has no spread to compare.
        assert "source" in result or len(compare(result, result)) > 1


def test_every_committed_file_is_used_by_a_page():
    """What no page shows or names is history, and is in git's."""
    shown = {name for table in readme.TABLES.values() for name in table.files}
    pages = "".join(page.read_text() for page in readme.ROOT.glob("docs/**/*.md"))
    unused = [path.name for path in readme.CURRENT.iterdir() if path.name not in shown and path.name not in pages]
    assert not unused


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_pages_show_what_is_rendered(page):
    text = page.read_text()
    assert "<!-- table " in text
    assert readme.render(text) == text, "run `python -m bench readme`"


def test_every_table_is_in_a_page():
    text = "".join(page.read_text() for page in readme.PAGES)
    assert {name for name in readme.TABLES if f"<!-- table {name} -->" not in text} == set()


def test_the_figure_is_what_is_drawn(tmp_path):
    assert main(["plot", "-o", str(tmp_path / "drawn.svg")]) == 0
    assert (tmp_path / "drawn.svg").read_text() == floor_figure.FILE.read_text(), "run `python -m bench plot`"


def written(folder, name, **fields):
    rows = {"flash": [row_of(41.26, tokens=1, ratio=1.176)], "pro": [row_of(734.2, tokens=128, ratio=1.04)]}
    result = {"device": "NVIDIA H200", "commit": "1234567", "date": "2026-11-30", "shapes": rows, **fields}
    (folder / name).write_text(json.dumps(result))


def test_a_table_says_what_it_is_of(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "CURRENT", tmp_path)
    written(tmp_path, "one.json")
    assert readme.lines_of(readme.Table(("one.json",), "python -m bench", (readme.US, readme.FLOOR))).split("\n") == [
        "H200, 2026-11-30, commit 1234567, `python -m bench`:",
        "",
        "| tokens | Flash, us | Flash, over the floor | Pro, us | Pro, over the floor |",
        "| --- | --- | --- | --- | --- |",
        "| 1 | 41.3 | 1.18 |  |  |",
        "| 128 |  |  | 734 | 1.04 |",
    ]


def test_a_table_beside_the_rival_names_its_version(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "CURRENT", tmp_path)
    rows = [
        row_of(41.26, tokens=1, rival=row_of(60.0)),
        row_of(150.0, tokens=8, rival={**row_of(1.0), "error": "wrong result"}),
    ]
    written(tmp_path, "one.json", shapes={"flash": rows}, rivals={"sgl-deep-gemm": "0.2.9"})
    written(tmp_path, "older.json")
    table = readme.Table(("one.json",), "python -m bench --rivals", (readme.US, readme.RIVAL))
    assert readme.lines_of(table).split("\n") == [
        "H200, 2026-11-30, commit 1234567, `python -m bench --rivals`, the rival is sgl-deep-gemm 0.2.9:",
        "",
        "| tokens | Flash, us | Flash, rival | Pro, us | Pro, rival |",
        "| --- | --- | --- | --- | --- |",
        "| 1 | 41.3 | 60.0 |  |  |",
        "| 8 | 150 |  |  |  |",
    ]
    # Files of before there was such a column do without.
    assert "rival" not in readme.lines_of(table._replace(files=("older.json",), command=""))
    with pytest.raises(ValueError, match=r"have sgl-deep-gemm and sgl-deep-gemm 0\.2\.9, wanted a table of one rival"):
        readme.lines_of(table._replace(files=("one.json", "older.json")))


def test_a_table_is_of_one_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "CURRENT", tmp_path)
    written(tmp_path, "one.json")
    written(tmp_path, "other.json", commit="7654321")
    with pytest.raises(ValueError, match="of several commits"):
        readme.lines_of(readme.Table(("one.json", "other.json"), "python -m bench", (readme.US,)))


def test_stale_pages_are_named_and_mended(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("<!-- table few -->\nold\n<!-- end of the table -->\n")
    monkeypatch.setattr(readme, "PAGES", (page,))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert main(["readme", "--check"]) == 1 and "old" in page.read_text()
    assert "README.md: is not what `python -m bench readme` makes of it" in capsys.readouterr().out
    assert main(["readme"]) == 0 and "commit 2ca5d4c" in page.read_text()
    assert main(["readme", "--check"]) == 0
    page.write_text("<!-- table unknown -->\n<!-- end of the table -->\n")
    with pytest.raises(ValueError, match="'unknown', wanted one of few"):
        main(["readme"])
