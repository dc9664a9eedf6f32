"""Progress of a long run, on the standard error."""

import sys
import time
from typing import TextIO


class Progress:
    """Numbers the steps, and says how long the run has taken and will about take."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self.num_steps, self.stream = num_steps, stream
        self.started, self.done = time.monotonic(), 0

    def step(self, label: str) -> None:
        """Says what is finished now."""
        self.done += 1
        elapsed = time.monotonic() - self.started
        left = elapsed / self.done * (self.num_steps - self.done)
        times = f"{minutes(elapsed)} so far" + (f", about {minutes(left)} left" if self.done < self.num_steps else "")
        print(f"[{self.done}/{self.num_steps}] {label} ({times})", file=self.stream or sys.stderr, flush=True)


def minutes(seconds: float) -> str:
    """90 -> 1m30s."""
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s" if seconds >= 60 else f"{int(seconds)}s"
