"""The figures of the documentation, drawn as SVG: `python -m figures`. README's plot is `python -m bench plot`."""

from collections.abc import Callable
from pathlib import Path

from figures import glossary, placements, places, timeline

FOLDER = Path(__file__).parent.parent / "docs"
FIGURES: dict[str, Callable[[], str]] = {
    "glossary.svg": glossary.draw,
    "placements.svg": placements.draw,
    "places.svg": places.draw,
    "timeline.svg": timeline.draw,
}
