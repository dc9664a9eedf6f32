"""docs/timeline.svg: what the roles of a thread block do in one call, as traced events say.

Flash with 128 tokens on an H200, 187 us, from docs/log/cache.md ("Where 128 tokens of Flash go on an H200 now"). The
plan, the first weights and the memory are from the trace before that one, in docs/log/dispatch.md. The middle of the
call is left out.
"""

from typing import NamedTuple

from figures.svg import COLOURS, Drawing

# us of the events.
COUNTED, PLANNED, WEIGHTS_ASKED, PLACED, STORED, ANNOUNCED, ALL_KNOWN = 1.2, 1.7, 2.3, 2.7, 4.0, 5.8, 7.0
FIRST_MULTIPLY, MEMORY_BUSY, FIRST_CTA_OUT, LAST_CTA_OUT, SUMMED = 7.7, 9.4, 177.0, 185.0, 187.0
LEFT, TOP, ROW, SCALE, BREAK_AT, RESUMES_AT, PAUSE = 168, 70, 46, 34.0, 13.0, 173.0, 60


class Bar(NamedTuple):
    """What a role does from one time to another."""

    start: float
    end: float
    text: str
    colour: str


ROWS: dict[str, list[Bar]] = {
    "consumers (8 warps)": [
        Bar(0.0, COUNTED, "count", COLOURS["scales"]),
        Bar(COUNTED, PLACED, "place", COLOURS["scales"]),
        Bar(PLACED, STORED, "store", COLOURS["tokens"]),
        Bar(FIRST_MULTIPLY, LAST_CTA_OUT, "multiply, promote, epilogues", COLOURS["weights"]),
        Bar(LAST_CTA_OUT, SUMMED, "sum", COLOURS["tokens"]),
    ],
    "weight producer": [
        Bar(COUNTED, PLANNED, "plan", COLOURS["scales"]),
        Bar(WEIGHTS_ASKED, FIRST_CTA_OUT, "weights into the ring, up to 96 KB on their way", COLOURS["weights"]),
    ],
    "token producer": [
        Bar(STORED, ALL_KNOWN, "waits for all shares", "none"),
        Bar(ALL_KNOWN, FIRST_CTA_OUT, "tokens into the same stages", COLOURS["tokens"]),
    ],
    "signallers": [
        Bar(STORED, ANNOUNCED, "announce", COLOURS["scales"]),
        Bar(RESUMES_AT, LAST_CTA_OUT, "announce each finished unit", COLOURS["scales"]),
    ],
    "the GPU's memory": [
        Bar(WEIGHTS_ASKED, MEMORY_BUSY, "7 stages for each block", "#e4ecf5"),
        Bar(MEMORY_BUSY, FIRST_CTA_OUT, "busy", COLOURS["weights"]),
        Bar(FIRST_CTA_OUT, LAST_CTA_OUT, "less and less", "#e4ecf5"),
    ],
}


def draw() -> str:
    """The figure: a row for each role, time to the right, the middle of the call left out."""
    drawing = Drawing(int(_x(SUMMED)) + 40, TOP + ROW * len(ROWS) + 70)
    drawing.text(20, 28, "one call: Flash, 128 tokens, H200; microseconds", 15, bold=True)
    bottom = TOP + ROW * len(ROWS)
    for time in (0, 2, 4, 6, 8, 10, 12, 174, 176, 178, 180, 182, 184, 186):
        drawing.line([(_x(time), TOP - 8), (_x(time), bottom)], "#e4e7eb")
        drawing.text(_x(time), TOP - 14, str(time), 11, "middle")
    for number, (role, bars) in enumerate(ROWS.items()):
        y = TOP + number * ROW
        drawing.text(LEFT - 12, y + 22, role, 12, "end")
        for bar in bars:
            drawing.box(_x(bar.start), y + 4, _x(bar.end) - _x(bar.start), 28, bar.colour, dashed=bar.colour == "none")
            middle = min(_x(bar.end), _x(BREAK_AT)) if bar.start < BREAK_AT else _x(bar.end)
            drawing.text((_x(bar.start) + middle) / 2, y + 22, bar.text, 10, "middle")
    gap = _x(BREAK_AT) + PAUSE / 2
    for x in (gap - 4, gap + 4):
        drawing.line([(x + 6, TOP - 20), (x - 6, bottom + 8)], COLOURS["frame"], 1.5)
    lines = (
        "Before the first multiply there is nothing but latency: ids, a plan, tokens written and seen by all.",
        "After it the memory decides: the units take 173 us, as long as the floor for all bytes.",
    )
    for number, line in enumerate(lines):
        drawing.text(LEFT, bottom + 26 + 20 * number, line, 12)
    return str(drawing)


def _x(time: float) -> float:
    if time <= BREAK_AT:
        return LEFT + time * SCALE
    return LEFT + BREAK_AT * SCALE + PAUSE + max(time - RESUMES_AT, 0.0) * SCALE
