"""The documentation: its figures are those that their scripts draw, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_glossary_shows_what_its_script_draws(tmp_path):
    drawn = tmp_path / "glossary.svg"
    subprocess.run([sys.executable, ROOT / "scripts" / "draw_glossary.py", drawn], check=True, timeout=60)
    assert drawn.read_text() == (ROOT / "docs" / "glossary.svg").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing
