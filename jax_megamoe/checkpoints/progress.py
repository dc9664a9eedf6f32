"""How far reading a checkpoint is: lines with GB/s and time left, or a function of the caller's."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from jax_megamoe.errors import ArgumentError

# True: lines on stderr. A function: called with (bytes read, bytes that this process reads in all).
Progress = bool | Callable[[int, int], object] | None

_SECONDS_BETWEEN_LINES = 1.0


class Report:
    """Tells how far it is, at most once a second where it prints."""

    def __init__(self, progress: Progress, total: int, what: str = "experts", out: TextIO | None = None) -> None:
        self._call = check_progress(progress)
        self._prints = progress is True
        self._done, self._total, self._what = 0, total, what
        self._out = out
        self._start = self._last = time.monotonic()

    def add(self, nbytes: int) -> None:
        """So many bytes more are read."""
        self._done += nbytes
        if self._call is not None:
            self._call(self._done, self._total)
        now = time.monotonic()
        if self._prints and (self._done >= self._total or now - self._last >= _SECONDS_BETWEEN_LINES):
            self._last = now
            text = progress_line(self._what, self._done, self._total, now - self._start)
            print(text, file=self._out or sys.stderr, flush=True)


def check_progress(progress: Progress) -> Callable[[int, int], object] | None:
    """The function to call, if any. Raises `ArgumentError` for other things."""
    if progress is None or isinstance(progress, bool):
        return None
    if not callable(progress):
        raise ArgumentError(
            f"progress is {progress!r}, wanted True, None or a function of (bytes, of how many): pass one."
        )
    return progress


def progress_line(what: str, done: int, total: int, seconds: float) -> str:
    """One line: "experts 12.3 of 40.0 GB (31 %), 2.05 GB/s, 14 s left"."""
    rate = done / seconds if seconds > 0 else 0.0
    share = 100 * done // total if total else 100
    text = f"{what} {done / 1e9:.3g} of {total / 1e9:.3g} GB ({share} %)"
    if rate > 0:
        text += f", {rate / 1e9:.3g} GB/s, "
        text += f"{(total - done) / rate:.0f} s left" if done < total else f"{seconds:.1f} s"
    return text
