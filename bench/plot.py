"""`python -m bench plot A`: time over the read ceiling against tokens, a panel for each shape."""

import math
import pathlib
from typing import Any, NamedTuple

from bench.records import label, rival_name, rival_us

# What a row holds beside our own time, and its name in the legend.
ALTERNATIVES = {"ragged_us": "ragged_dot, bf16", "dense_us": "dense, bf16"}


class Line(NamedTuple):
    """One line of a panel."""

    name: str
    tokens: list[int]
    ratios: list[float]
    is_ours: bool


def panels(results: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """The lines of each panel, ours first; rows without a ceiling, as from a CPU, have no place in them."""
    found: dict[str, list[Line]] = {}
    devices = [result["device"] for result in results]
    for result in results:
        device = result["device"]
        where = device if devices.count(device) == 1 else f"{device}, {result['commit']}"
        for name, rows in result["shapes"].items():
            usual = result.get("routing", "uniform")
            kinds = [(row.get("routing", usual), row.get("format", "fp8_block")) for row in rows]
            for kind in dict.fromkeys(kinds):
                kept = [row for row, of in zip(rows, kinds, strict=True) if of == kind and "ceiling_us" in row]
                lines = [
                    _line(f"jax_megamoe, {where}", [(row, row["us"]) for row in kept], is_ours=True),
                    _line(
                        f"{rival_name(result)}, {where}",
                        [(row, us) for row in kept if (us := rival_us(row)) is not None],
                    ),
                    *(
                        _line(f"{title}, {where}", [(row, row[key]) for row in kept if key in row])
                        for key, title in ALTERNATIVES.items()
                    ),
                ]
                found.setdefault(label(name, *kind), []).extend(line for line in lines if line.tokens)
    return {title: sorted(lines, key=lambda line: not line.is_ours) for title, lines in found.items() if lines}


def _line(name: str, times: list[tuple[dict[str, Any], float]], is_ours: bool = False) -> Line:
    return Line(name, [row["tokens"] for row, _ in times], [us / row["ceiling_us"] for row, us in times], is_ours)


def plot(results: list[dict[str, Any]], output: pathlib.Path) -> None:
    """Draws the panels into a file; `ValueError` where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = panels(results)
    if not drawn:
        raise ValueError("no row has a read ceiling, which only a GPU has: nothing to plot")
    columns = min(len(drawn), 3)
    rows = math.ceil(len(drawn) / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 3.8 * rows), squeeze=False)
    for axes, (title, lines) in zip(grid.flat, drawn.items(), strict=False):
        for line in lines:
            style = {"marker": "o", "linewidth": 2.0} if line.is_ours else {"marker": "s", "linestyle": "--"}
            axes.plot(line.tokens, line.ratios, label=line.name, markersize=4, **style)
        axes.set(title=title, xscale="log", xlabel="tokens M", ylabel="time / read ceiling")
        axes.set_xticks(ticks := sorted({tokens for line in lines for tokens in line.tokens}), map(str, ticks))
        axes.minorticks_off()
        # Baselines that read twice the bytes, or many times, would press the others together.
        if max(ratio for line in lines for ratio in line.ratios) > 4:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.axhline(1.0, color="gray", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in list(grid.flat)[len(drawn) :]:
        axes.remove()
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)
