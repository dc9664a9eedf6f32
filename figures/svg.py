"""SVG elements in one style, which all figures share."""

COLOURS = {"weights": "#c7dcf2", "tokens": "#f6dfb4", "scales": "#d9e8cf", "frame": "#5a6570"}


class Drawing:
    """SVG elements, with text in one style."""

    def __init__(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._elements: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str = "none", dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
            f'stroke="{COLOURS["frame"]}"{dash}/>'
        )

    def text(self, x: float, y: float, text: str, size: int = 12, anchor: str = "start", bold: bool = False) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self._elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="#222"{weight}>{text}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self._elements.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{COLOURS["frame"]}" '
            'stroke-width="1.5" marker-end="url(#head)"/>'
        )

    def line(self, points: list[tuple[float, float]], colour: str, width: float = 1, dash: str = "") -> None:
        """A line through all points."""
        through = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._elements.append(
            f'<polyline points="{through}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashes}/>'
        )

    def dot(self, x: float, y: float, colour: str) -> None:
        self._elements.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')

    def __str__(self) -> str:
        width, height = self._size
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{COLOURS["frame"]}"/></marker></defs>'
        )
        body = "\n".join(self._elements)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
            f'<rect width="{width}" height="{height}" fill="white"/>\n{head}\n{body}\n</svg>\n'
        )
