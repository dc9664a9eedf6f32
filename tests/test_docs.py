"""The documentation: its figures are those that are drawn, its links lead somewhere, its examples run."""

import ast
import functools
import importlib.util
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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_whole(page):
    """A row that an empty line parts from its table is shown as text."""
    lines = ["", *without_code(page.read_text()).splitlines(), ""]
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith("|") and not before.startswith("|"):
            assert re.fullmatch(r"[|\s:-]+", after), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_is_python(page):
    """Also what does not run here, for want of a model."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        ast.parse(block, name_of(page))


# Examples. Fences without a language are commands, or parts that need files.

# README's checkpoint is one that a reader has.
EXAMPLES = (
    "README.md",
    "docs/getting-started.md",
    "docs/where-things-are.md",
    "docs/decode-loop.md",
    "docs/recipes.md",
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name):
    """All blocks of a page, one after the other, as a reader would paste them."""
    if len(jax.devices("cpu")) < 8:
        pytest.skip("fewer than eight CPU devices: XLA_FLAGS names another number")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if "read_checkpoint(" not in block]
    for package in ("flax", "equinox"):
        if importlib.util.find_spec(package) is None:
            blocks = [block for block in blocks if f"{package}_" not in block]
    assert blocks
    exec(compile("\n".join(blocks), name, "exec"), {"__name__": "example"})


# Troubleshooting.

MESSAGES = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
SYMPTOMS = MESSAGES[-3:]  # what comes without a message


@functools.cache
def source_texts() -> list[str]:
    """The fixed parts of all strings of the package, and the text of its C++ files, literals of several lines joined."""
    texts = []
    for path in (ROOT / "jax_megamoe").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        texts += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for pattern in ("*.cc", "*.h"):
        texts += [re.sub(r'"\s*"', "", path.read_text()) for path in (ROOT / "jax_megamoe" / "cuda").rglob(pattern)]
    return texts


@pytest.mark.parametrize("message", MESSAGES[: -len(SYMPTOMS)])
def test_troubleshooting_has_texts_of_the_code(message):
    parts = [part.strip() for part in message.split("…")]
    for part in filter(lambda part: len(part) > 3, parts):
        assert any(part in text for text in source_texts()), f"no message of the package has {part!r}"


def test_troubleshooting_ends_with_symptoms():
    assert SYMPTOMS == [
        "NaN in a result",
        "a layer takes far longer than the tables say",
        "a jitted step compiles twice",
    ]
    assert len(MESSAGES) > 25


# The site.


def test_every_page_is_in_the_site():
    pages = {name_of(page).removeprefix("docs/").removesuffix(".md") for page in ROOT.glob("docs/**/*.md")}
    trees = re.findall(r"^```{toctree}\n(.*?)^```", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted([*listed, "index"]) == sorted(pages)


def test_a_decode_loop_has_the_recommended_flags():
    import jax_megamoe as mm

    assert f"XLA_FLAGS='{mm.recommended_xla_flags()}'" in (ROOT / "docs" / "decode-loop.md").read_text()


def test_every_public_name_has_an_entry_in_the_api_page():
    import jax_megamoe as mm

    entries = set(re.findall(r":: jax_megamoe\.(\w+)", (ROOT / "docs" / "api.md").read_text()))
    told_elsewhere = {"DISABLE_JAX_EXPORT_CHECKS"}  # recipes.md, "Export"
    assert set(mm.__all__) - entries == told_elsewhere
