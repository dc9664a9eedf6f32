"""The site of these pages, which `scripts/docs` builds: Sphinx, with the pages as they are, in Markdown.

Docstrings are Markdown as well, with sections as Google's style has them: `_as_restructured_text` is between them and
Sphinx. The package is imported from the checkout, without its compiled module, whether or not there is one.
"""

import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
missing: Any = None  # to Python, a module that cannot be found
sys.modules["jax_megamoe._core"] = missing

project = "jax_megamoe"
copyright = "the jax_megamoe authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4  # links name headings as GitHub makes anchors of them
smartquotes = False  # defaults are code, and are to be copied
html_theme = "furo"
html_title = "jax_megamoe"
html_copy_source = False
html_show_sphinx = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90


def _as_restructured_text(
    _app: object, _what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Code between single backticks gets two, and tables become list tables."""
    converted: list[str] = []
    for is_table, group in groupby(lines, key=lambda line: line.lstrip().startswith("|")):
        rows = [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line) for line in group]
        converted += _list_table(rows) if is_table else rows
    # A span of code that goes on in the next line.
    text = re.sub(r"(?<!`)`([^`\n]+)\n\s*([^`\n]+)`(?!`)", r"``\1 \2``", "\n".join(converted))
    lines[:] = text.split("\n")


def _list_table(rows: list[str]) -> list[str]:
    indent = re.match(r" *", rows[0])
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (cells[0], *cells[2:]):
        lines += [f"   {'* -' if number == 0 else '  -'} {cell}" for number, cell in enumerate(row)]
    return ["", *((indent[0] if indent else "") + line for line in lines), ""]


def setup(app: Any) -> None:
    """Before napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=100)
