"""docs/glossary.svg: weights, an image, and the ring in which they meet."""

from figures.svg import COLOURS, Drawing

PLANE, GAP = 34, 4


def draw() -> str:
    """The figure: an expert's gate/up weights above, a chunk's image below, a CTA's ring to the right."""
    drawing = Drawing(960, 360)
    _weights(drawing, 70, 46)
    _image(drawing, 70, 256)
    _ring(drawing, 500, 110)
    return str(drawing)


def _weights(drawing: Drawing, x: int, y: int) -> None:
    drawing.text(x - 50, y - 20, "gate/up weights of an expert", bold=True)
    for tile in range(3):
        top = y + tile * (PLANE + 14)
        drawing.text(x - 50, top + PLANE / 2 + 4, f"tile {tile}")
        for block in range(6):
            for plane in range(2):
                drawing.box(x + block * (PLANE + 10) + plane * PLANE / 2, top, PLANE / 2, PLANE, COLOURS["weights"])
    right = x + 6 * (PLANE + 10) - 10
    drawing.box(right - 2 * PLANE - 14, y - 4, 2 * PLANE + 18, PLANE + 8, dashed=True)
    drawing.arrow(right + 8, y + PLANE / 2, 496, 136)
    drawing.text(right + 14, y + 6, "two K blocks", 11)
    drawing.text(
        x - 50, y + 3 * (PLANE + 14) + 6, "a box is a plane, 64 rows x 128 bytes; a pair of them is a K block", 11
    )


def _image(drawing: Drawing, x: int, y: int) -> None:
    drawing.text(x - 50, y - 20, "image of a chunk: its tokens, or its activations", bold=True)
    drawing.text(x - 50, y + 28, "planes")
    drawing.text(x - 50, y + 66, "scales")
    for block in range(6):
        drawing.box(x + block * (PLANE + GAP), y, PLANE, 50, COLOURS["tokens"])
        drawing.box(x + block * (PLANE + GAP), y + 56, PLANE, 10, COLOURS["scales"])
    right = x + 6 * (PLANE + GAP) - GAP
    drawing.box(right - 2 * PLANE - GAP - 4, y - 4, 2 * PLANE + GAP + 8, 74, dashed=True)
    drawing.arrow(right + 8, y + 30, 496, 184)
    drawing.text(x - 50, y + 88, "a plane is 128 columns of all rows: the chunk's tokens, padded to eight", 11)


def _ring(drawing: Drawing, x: int, y: int) -> None:
    drawing.text(x, y - 40, "the ring of a CTA, in shared memory", bold=True)
    for stage in range(4):
        left = x + stage * 98
        drawing.box(left, y, 88, 110)
        drawing.box(left + 6, y + 6, 76, 40, COLOURS["weights"])
        drawing.text(left + 44, y + 30, "weights", 11, "middle")
        drawing.box(left + 6, y + 52, 76, 28, COLOURS["tokens"])
        drawing.text(left + 44, y + 70, "tokens", 11, "middle")
        drawing.box(left + 6, y + 86, 76, 16, COLOURS["scales"])
        drawing.text(left + 44, y + 98, "scales", 10, "middle")
        drawing.text(left + 44, y - 8, f"stage {stage}", 11, "middle")
    drawing.arrow(x + 44, y + 128, x + 44 + 3 * 98, y + 128)
    lines = (
        "producers fill the stages in turn; consumers multiply what has landed",
        "a unit is a tile's whole row of K blocks times a chunk, stage after stage",
        "its note says expert, chunk and rows; a ticket stands for the next unit",
    )
    for number, line in enumerate(lines):
        drawing.text(x, y + 152 + 18 * number, line)
