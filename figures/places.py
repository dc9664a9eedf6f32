"""docs/places.svg: where tokens and experts are on a mesh of 2 x 4 devices, and the way of one token."""

from figures.svg import COLOURS, Drawing

WIDTH, HEIGHT, ACROSS, DOWN = 190, 118, 216, 186
RANKS, REPLICAS, EXPERTS = 4, 2, 8


def draw() -> str:
    """The figure: a row of devices for each index of "data", a column for each index of "expert"."""
    drawing = Drawing(1000, 500)
    drawing.text(20, 28, 'mesh ("data": 2, "expert": 4), 8 experts, 16 tokens, top_k = 2', 15, bold=True)
    for rank in range(RANKS):
        drawing.text(118 + rank * ACROSS + WIDTH / 2, 62, f'"expert" {rank}', 13, "middle")
    for replica in range(REPLICAS):
        drawing.text(20, 74 + replica * DOWN + HEIGHT / 2, f'"data" {replica}', 13)
        for rank in range(RANKS):
            _device(drawing, 118 + rank * ACROSS, 74 + replica * DOWN, replica, rank)
    _way(drawing)
    lines = (
        "A row has all experts once. Rows are replicas: no token leaves its row.",
        'Tokens are split over both axes (token_axes), weights over "expert" (expert_axis). Both stay where they are.',
        "A token's values travel to the devices of its experts, and their results back. Nothing else travels.",
    )
    for number, line in enumerate(lines):
        drawing.text(118, 448 + 18 * number, line)
    return str(drawing)


def _device(drawing: Drawing, x: float, y: float, replica: int, rank: int) -> None:
    drawing.box(x, y, WIDTH, HEIGHT)
    each = EXPERTS // RANKS
    for number in range(each):
        left = x + 12 + number * 86
        drawing.box(left, y + 12, 80, 44, COLOURS["weights"])
        drawing.text(left + 40, y + 39, f"expert {rank * each + number}", 12, "middle")
    tokens = 16 // RANKS // REPLICAS
    for number in range(tokens):
        left = x + 12 + number * 86
        drawing.box(left, y + 70, 80, 34, COLOURS["tokens"])
        drawing.text(left + 40, y + 92, f"token {(replica * RANKS + rank) * tokens + number}", 12, "middle")


def _way(drawing: Drawing) -> None:
    """Token 3, of device 1 of the first row: its experts are 0 and 7."""
    top = 74 + HEIGHT
    source = 118 + ACROSS + 12 + 86 + 40
    drawing.line([(source, top - 14), (source, top + 24)], COLOURS["frame"], 1.5)
    for expert_x in (118 + 52, 118 + 3 * ACROSS + 12 + 86 + 40):
        drawing.line([(source, top + 24), (expert_x, top + 24)], COLOURS["frame"], 1.5)
        drawing.arrow(expert_x, top + 24, expert_x, top + 2)
    drawing.text(source + 8, top + 42, "token 3 goes to its experts 0 and 7, and both results come back", 12)
