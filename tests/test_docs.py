"""The documentation: its figures are those that are drawn, its links lead somewhere, its examples run."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from figures import FIGURES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MOST_COLUMNS = 120


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    """Headings and links are looked for in what is left."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them and as the site does."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_figures_are_what_is_drawn(tmp_path):
    subprocess.run([sys.executable, "-m", "figures", tmp_path], cwd=ROOT, check=True, timeout=60)
    assert len(FIGURES) >= 3
    for name in FIGURES:
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), "run `python -m figures`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", without_code(page.read_text()))
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: there is no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: the page has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_prose_is_wrapped(page):
    """Tables and code excepted, and single words that are longer, such as a path."""
    lines = without_code(page.read_text()).splitlines()
    assert [line for line in lines if len(line) > MOST_COLUMNS and not line.startswith("|")] == []
