"""How far reading a checkpoint is: a bar on a terminal, lines elsewhere, or a function of the caller's."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from jax_megamoe.arrays import text_of
from jax_megamoe.errors import ArgumentError

# True: on stderr. A function: called with (bytes read, bytes that this process reads in all).
Progress = bool | Callable[[int, int], object] | None

_SECONDS_BETWEEN_LINES = 1.0


class Report:
    """Tells how far it is: redrawn on a terminal, and elsewhere in lines, at most one a second."""

    def __init__(self, progress: Progress, total: int, what: str = "experts", out: TextIO | None = None) -> None:
        self._call = check_progress(progress)
        self._done, self._total, self._what = 0, total, what
        self._out = out or sys.stderr
        self._start = self._last = time.monotonic()
        self._bar, self._prints_lines = None, False
        if progress is True:
            self._prints_lines = not self._out.isatty()
            if not self._prints_lines:
                # Not above: most programs show no bar, and importing the package should take no longer for it.
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=what.rstrip(","), unit="B", unit_scale=True, file=self._out)

    def add(self, nbytes: int) -> None:
        """So many bytes more are read."""
        self._done += nbytes
        if self._call is not None:
            self._call(self._done, self._total)
        if self._bar is not None:
            self._bar.update(nbytes)
            if self._done >= self._total:
                self._bar.close()
        now = time.monotonic()
        if self._prints_lines and (self._done >= self._total or now - self._last >= _SECONDS_BETWEEN_LINES):
            self._last = now
            print(progress_line(self._what, self._done, self._total, now - self._start), file=self._out, flush=True)


def check_progress(progress: Progress) -> Callable[[int, int], object] | None:
    """The function to call, if any. Raises `ArgumentError` for other things."""
    if progress is None or isinstance(progress, bool):
        return None
    if not callable(progress):
        raise ArgumentError(
            f"progress is {text_of(progress)}, wanted True, None or a function of (bytes, of how many): pass one."
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
