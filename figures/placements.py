"""docs/placements.svg: three ways to place one layer on four devices, side by side."""

from figures.svg import COLOURS, Drawing

WIDTH, ROW, GAP, LEFT, TOP, DEVICES = 86, 30, 8, 20, 86, 4
# What each of the four devices has, from top to bottom: the kind, which has a colour, and a text for each device.
Row = tuple[str, tuple[str, str, str, str]]
PANELS: dict[str, tuple[str, list[Row]]] = {
    "expert_axis=None": (
        "each device has all experts; nothing travels",
        [("weights", ("experts 0-7",) * 4), ("tokens", ("tokens 0-3", "4-7", "8-11", "12-15"))],
    ),
    'expert_axis="expert"': (
        "tokens travel to experts; shared ones are everywhere",
        [
            ("weights", ("experts 0-1", "2-3", "4-5", "6-7")),
            ("scales", ("shared",) * 4),
            ("tokens", ("tokens 0-3", "4-7", "8-11", "12-15")),
        ],
    ),
    "a decoder on one axis": (
        "attention by heads, experts by the same axis",
        [
            ("scales", ("heads 0-1", "2-3", "4-5", "6-7")),
            ("weights", ("experts 0-1", "2-3", "4-5", "6-7")),
            ("tokens", ("tokens 0-3", "4-7", "8-11", "12-15")),
        ],
    ),
}


def draw() -> str:
    """The figure: a panel for each way, a column for each device."""
    panel = DEVICES * (WIDTH + GAP)
    drawing = Drawing(LEFT + len(PANELS) * (panel + 24), 232)
    for number, (title, (explanation, rows)) in enumerate(PANELS.items()):
        left = LEFT + number * (panel + 24)
        drawing.text(left, 28, title, 14, bold=True)
        drawing.text(left, 50, explanation, 12)
        for device in range(DEVICES):
            x = left + device * (WIDTH + GAP)
            drawing.text(x + WIDTH / 2, TOP - 10, f"device {device}", 11, "middle")
            drawing.box(x, TOP, WIDTH, 3 * (ROW + 6) + 10)
            for line, (kind, texts) in enumerate(rows):
                y = TOP + 8 + line * (ROW + 6)
                drawing.box(x + 5, y, WIDTH - 10, ROW, COLOURS[kind])
                drawing.text(x + WIDTH / 2, y + ROW / 2 + 4, texts[device], 11, "middle")
    return str(drawing)
