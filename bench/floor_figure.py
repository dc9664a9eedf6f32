"""README's figure: time over the memory floor against tokens, of ours, the rival and `ragged_dot` on one H200."""

import math
from typing import Any, NamedTuple

from bench import records
from bench.readme import ROOT, SHAPES, TABLES, results_of, rows_of
from figures.svg import Drawing

FILE = ROOT / "docs" / "time-over-floor.svg"
WIDTH, HEIGHT, LEFT, TOP, GAP = 390, 300, 64, 58, 70
MOST_TOKENS, MOST_RATIO = 8192, 40


class Line(NamedTuple):
    """One line of a panel: (tokens, time over the floor) of each point."""

    name: str
    points: list[tuple[int, float]]
    colour: str
    dash: str


def lines_of(shape: str) -> list[Line]:
    """The lines of a shape, the others' first, so that ours lies on top."""
    rival = [(row["tokens"], records.rival_us(row), row["ceiling_us"]) for row in _fp8_rows("rivals", shape)]
    ours = [(row["tokens"], row["ratio"]) for name in ("few", "many") for row in _fp8_rows(name, shape)]
    alternatives = [(row["tokens"], row["ragged_us"] / row["ceiling_us"]) for row in _fp8_rows("jax", shape)]
    rival_name = records.rival_name(results_of(TABLES["rivals"])[0])

    return [
        Line("ragged_dot, BF16", alternatives, "#8a8f98", "2 3"),
        Line(rival_name, [(tokens, us / floor) for tokens, us, floor in rival if us is not None], "#b0413e", "6 3"),
        Line("jax_megamoe", ours, "#1f5fa8", ""),
    ]


def _fp8_rows(name: str, shape: str) -> list[dict[str, Any]]:
    """The rows of block FP8 that a table has of a shape, by the number of tokens."""
    by_format = [shapes.get(shape, {}) for shapes in rows_of(TABLES[name]).values()]
    return [formats["fp8_block"] for formats in by_format if "fp8_block" in formats]


def draw() -> str:
    """The figure as SVG: a panel for each shape, both axes logarithmic."""
    drawing = Drawing(LEFT + 2 * WIDTH + GAP + 24, TOP + HEIGHT + 84)
    drawing.text(LEFT, 22, "time / memory floor: the time in which the GPU reads the FP8 weights once", 14, bold=True)
    for number, shape in enumerate(SHAPES):
        _panel(drawing, LEFT + number * (WIDTH + GAP), shape)
    x = float(LEFT)
    for line in reversed(lines_of("flash")):
        y = TOP + HEIGHT + 66
        drawing.line([(x, y - 4), (x + 30, y - 4)], line.colour, 2.5, line.dash)
        drawing.dot(x + 15, y - 4, line.colour)
        drawing.text(x + 38, y, line.name)
        x += 200
    return str(drawing)


def _panel(drawing: Drawing, left: int, shape: str) -> None:
    def at(tokens: float, ratio: float) -> tuple[float, float]:
        across = math.log(tokens) / math.log(MOST_TOKENS)
        up = math.log(ratio) / math.log(MOST_RATIO)
        return left + WIDTH * across, TOP + HEIGHT * (1 - up)

    drawing.text(left + WIDTH / 2, TOP - 12, f"{SHAPES[shape]}, one rank of eight, H200", 13, "middle")
    for ratio in (1, 1.5, 2, 3, 5, 10, 20, 40):
        drawing.line([at(1, ratio), at(MOST_TOKENS, ratio)], "#c9ced6" if ratio > 1 else "#444", 1)
        drawing.text(left - 8, at(1, ratio)[1] + 4, f"{ratio:g}", 11, "end")
    for tokens in (1, 8, 32, 128, 512, 2048, 8192):
        drawing.line([at(tokens, 1), at(tokens, MOST_RATIO)], "#e4e7eb", 1)
        drawing.text(at(tokens, 1)[0], TOP + HEIGHT + 18, str(tokens), 11, "middle")
    drawing.text(left + WIDTH / 2, TOP + HEIGHT + 38, "tokens", 12, "middle")
    for line in lines_of(shape):
        drawing.line([at(*point) for point in line.points], line.colour, 2.5, line.dash)
        for point in line.points:
            drawing.dot(*at(*point), line.colour)
