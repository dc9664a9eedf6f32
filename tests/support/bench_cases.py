"""What the tests of the benchmark share: a small shape, and rows as results have them."""

from typing import Any

from bench.shape import Shape

SMALL = Shape(256, 128, 16, 4)


def row_of(us: float, tokens: int = 8, spread: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "us": us, "us_least": us - spread, "us_most": us + spread, **more}
