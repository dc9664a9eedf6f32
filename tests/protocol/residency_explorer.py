"""Walks through all orders of events in launches of which only some CTAs are there (`residency.py` says what happens)."""

from collections.abc import Hashable, Iterator
from functools import cache
from typing import Any, NamedTuple

from tests.protocol.residency import Blocker, Cta, Mechanism, Memory, Rank, Scene, put
from tests.protocol.residency_cta import CtaSteps
from tests.protocol.search import Outcome, search


class _State(NamedTuple):
    ranks: tuple[int, ...]  # the state that each is in, by its number (`_Numbers`)
    blockers: tuple[tuple[int, ...] | None, ...]  # the GPUs where each has started; None when it has ended


class _Numbers[T: Hashable]:
    """Numbers for values, which are hashed much faster than nested tuples."""

    def __init__(self) -> None:
        self.values: list[T] = []
        self._numbers: dict[T, int] = {}

    def of(self, value: T) -> int:
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


class _NumberedStep(NamedTuple):
    label: str
    rank: int
    commutes: bool


def explore(scene: Scene, mechanism: Mechanism, tries_all: bool = False) -> Outcome:
    """Walks through all states. Steps that commute are taken at once, unless `tries_all`.

    They can happen in any case, whatever else does, and nobody does better or worse if they happen later: a CTA goes on
    within itself, finds what cannot change any more, or writes what others can only wait for or have overwritten.
    """
    return _Explorer(scene, mechanism, tries_all).run()


class _Explorer:
    def __init__(self, scene: Scene, mechanism: Mechanism, tries_all: bool) -> None:
        self.scene, self.tries_all, self.cta_steps = scene, tries_all, CtaSteps(scene, mechanism)
        self.ranks, self.memories = _Numbers[Rank](), _Numbers[Memory]()
        self.slots = tuple(scene.slots(gpu) for gpu in range(len(scene.ctas)))
        # Ranks are often in states that they were in, and several steps lead to states from which the same ones commute.
        self.steps_of_rank, self.settled, self.blocked = (
            cache(self._steps_of_rank),
            cache(self._settled),
            cache(self._blocked),
        )
        self.memory_of, self.running = cache(self._memory_of), cache(self._running)

    def run(self) -> Outcome:
        ranks = tuple(self.ranks.of(Rank((Cta(),) * n, (0,) * n, (0,) * n)) for n in self.scene.ctas)
        return search(_State(ranks, ((),) * len(self.scene.blockers)), self._moves, self._is_end)

    def _is_end(self, state: _State) -> bool:
        blocked = (b.ends and on is not None for b, on in zip(self.scene.blockers, state.blockers, strict=True))
        return all(map(self._has_ended, state.ranks)) and not any(blocked)

    def _has_ended(self, rank: int) -> bool:
        return self.ranks.values[rank].memory.launch > self.scene.num_launches

    def _moves(self, state: _State) -> Iterator[tuple[str, _State]]:
        for number, blocker in enumerate(self.scene.blockers):
            for label, on in self._blocker_steps(state, blocker, state.blockers[number]):
                yield f"blocker {number} {label}", state._replace(blockers=put(state.blockers, number, on))
        for r, steps in enumerate(self._steps(state)):
            for step in steps:
                labels, settled = self.settled(_State(put(state.ranks, r, step.rank), state.blockers))
                yield step.label + labels, settled

    def _settled(self, state: _State) -> tuple[str, _State]:
        """All steps that commute, and the state after them."""
        labels = ""
        while not self.tries_all:
            found = ((r, step) for r, steps in enumerate(self._steps(state)) for step in steps if step.commutes)
            if (first := next(found, None)) is None:
                break
            r, step = first
            labels, state = f"{labels}; {step.label}", _State(put(state.ranks, r, step.rank), state.blockers)
        return labels, state

    def _steps(self, state: _State) -> Iterator[tuple[_NumberedStep, ...]]:
        """For each rank."""
        memories, blocked = tuple(map(self.memory_of, state.ranks)), self.blocked(state.blockers)
        for r, rank in enumerate(state.ranks):
            yield self.steps_of_rank(r, rank, memories, self.slots[r] > self.running(rank) + blocked[r])

    def _steps_of_rank(self, r: int, rank: int, memories: tuple[int, ...], has_slot: bool) -> tuple[_NumberedStep, ...]:
        if self._has_ended(rank):
            return ()
        found = self.cta_steps.of_rank(
            r, self.ranks.values[rank], tuple(self.memories.values[m] for m in memories), has_slot
        )
        return tuple(_NumberedStep(step.label, self.ranks.of(step.rank), step.commutes) for step in found)

    def _memory_of(self, rank: int) -> int:
        return self.memories.of(self.ranks.values[rank].memory)

    def _blocked(self, blockers: tuple[tuple[int, ...] | None, ...]) -> tuple[int, ...]:
        """Slots of each GPU that blockers have."""
        return tuple(sum(gpu in on for on in blockers if on is not None) for gpu in range(len(self.slots)))

    def _running(self, rank: int) -> int:
        return sum(cta.consumers not in ("absent", "ended") for cta in self.ranks.values[rank].ctas)

    def _blocker_steps(self, state: _State, blocker: Blocker, on: tuple[int, ...] | None) -> Iterator[tuple[str, Any]]:
        if on is None:
            return
        for gpu in blocker.gpus:
            is_free = self.slots[gpu] > self.running(state.ranks[gpu]) + self.blocked(state.blockers)[gpu]
            if gpu not in on and is_free:
                yield f"starts on GPU {gpu}", tuple(sorted((*on, gpu)))
        if len(on) == len(blocker.gpus) and blocker.ends:
            yield "ends", None
