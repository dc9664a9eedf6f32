"""How far results are apart: by their bits, or by one number."""

from typing import Any

import numpy as np


def difference(a: Any, b: Any) -> float:
    """|a - b|^2 / (|a|^2 + |b|^2) in float64: 0 for equal arrays, also of zeros; NaN where either has one."""
    a, b = (np.asarray(array).astype(np.float64).ravel() for array in (a, b))
    norm = a @ a + b @ b
    return 0.0 if norm == 0 else float(((a - b) @ (a - b)) / norm)


def bits(y: Any) -> np.ndarray:
    """The bits of a bfloat16 array, of which even NaN equals itself."""
    return np.asarray(y).view(np.uint16)


def judge(y: Any, wanted: Any) -> str:
    """What a part of a result is: right, nan, or wrong in a way that is said."""
    found, expected = bits(y), bits(wanted)
    if found.shape == expected.shape and np.array_equal(found, expected):
        return "right"
    nans = np.isnan(np.asarray(y, np.float32))
    if nans.all():
        return "nan"
    return f"wrong: {int((found != expected).sum())} of {found.size} numbers, {int(nans.sum())} of them NaN"
