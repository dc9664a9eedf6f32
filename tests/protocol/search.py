"""Walks through all states that a protocol can get into, and says what goes wrong on which way."""

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple


class Outcome(NamedTuple):
    """What was found: no error, or one with the steps that lead to it."""

    error: str | None
    trace: list[str]
    num_states: int


class Wrong(Exception):
    """Raised by a step that must not happen."""


def search[State: Hashable](
    start: State, moves: Callable[[State], Iterable[tuple[str, State]]], is_end: Callable[[State], bool]
) -> Outcome:
    """Depth first; ends at the first error: a step that is wrong, or a state that is no end and has no steps."""
    parents: dict[State, tuple[State, str] | None] = {start: None}
    stack = [start]
    while stack:
        state = stack.pop()
        moved = False
        try:
            for label, following in moves(state):
                moved = True
                if following not in parents:
                    parents[following] = (state, label)
                    stack.append(following)
        except Wrong as wrong:
            return Outcome(str(wrong), [*_trace(parents, state), str(wrong)], len(parents))
        if not moved and not is_end(state):
            return Outcome("nobody can go on", _trace(parents, state), len(parents))
    return Outcome(None, [], len(parents))


def _trace[State: Hashable](parents: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    labels: list[str] = []
    while (origin := parents[state]) is not None:
        state, label = origin
        labels.append(label)
    return labels[::-1]
