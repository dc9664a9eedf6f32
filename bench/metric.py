"""How far two results are apart, the same for NumPy's arrays and torch's tensors."""

from typing import Any


def relative_difference(a: Any, b: Any) -> float:
    """|a - b|^2 / (|a|^2 + |b|^2) of two flat float64 vectors: 0 where equal; NaN where either has one."""
    norm = float(a @ a + b @ b)
    return float((a - b) @ (a - b)) / norm if norm else 0.0
