"""Walks through all orders of events in launches of which only some CTAs are there (`residency.py` says what happens)."""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from tests.protocol.residency import Blocker, Cta, Mechanism, Rank, Scene, put
from tests.protocol.residency_cta import CtaSteps, Step
from tests.protocol.search import Outcome, search


class _State(NamedTuple):
    ranks: tuple[Rank, ...]
    blockers: tuple[tuple[int, ...] | None, ...]  # the GPUs where each has started; None when it has ended


def explore(scene: Scene, mechanism: Mechanism, tries_all: bool = False) -> Outcome:
    """Walks through all states. Steps that commute are taken at once, unless `tries_all`.

    They can happen in any case, whatever else does, and nobody does better or worse if they happen later: a CTA goes on
    within itself, finds what cannot change any more, or writes what others can only wait for or have overwritten.
    """
    return _Explorer(scene, mechanism, tries_all).run()


class _Explorer:
    def __init__(self, scene: Scene, mechanism: Mechanism, tries_all: bool) -> None:
        self.scene, self.tries_all = scene, tries_all
        self.cta_steps = cache(CtaSteps(scene, mechanism).of_rank)  # ranks are often in the states that they were in

    def run(self) -> Outcome:
        ranks = tuple(Rank((Cta(),) * n, (0,) * n, (0,) * n) for n in self.scene.ctas)
        return search(_State(ranks, ((),) * len(self.scene.blockers)), self._moves, self._is_end)

    def _is_end(self, state: _State) -> bool:
        blocked = (b.ends and on is not None for b, on in zip(self.scene.blockers, state.blockers, strict=True))
        return all(rank.memory.launch > self.scene.num_launches for rank in state.ranks) and not any(blocked)

    def _moves(self, state: _State) -> Iterator[tuple[str, _State]]:
        for number, blocker in enumerate(self.scene.blockers):
            for label, on in self._blocker_steps(state, blocker, state.blockers[number]):
                yield f"blocker {number} {label}", state._replace(blockers=put(state.blockers, number, on))
        for r, steps in enumerate(self._steps(state)):
            for step in steps:
                yield self._settled(step.label, state._replace(ranks=put(state.ranks, r, step.rank)))

    def _settled(self, label: str, state: _State) -> tuple[str, _State]:
        """The state after all steps that commute."""
        while not self.tries_all:
            found = ((r, step) for r, steps in enumerate(self._steps(state)) for step in steps if step.commutes)
            if (first := next(found, None)) is None:
                break
            r, step = first
            label, state = f"{label}; {step.label}", state._replace(ranks=put(state.ranks, r, step.rank))
        return label, state

    def _steps(self, state: _State) -> Iterator[list[Step]]:
        """For each rank."""
        memories = tuple(rank.memory for rank in state.ranks)
        for r, rank in enumerate(state.ranks):
            has_slot = self._free_slots(state, r) > 0
            yield self.cta_steps(r, rank, memories, has_slot) if rank.memory.launch <= self.scene.num_launches else []

    def _free_slots(self, state: _State, gpu: int) -> int:
        running = sum(cta.consumers not in ("absent", "ended") for cta in state.ranks[gpu].ctas)
        return self.scene.slots(gpu) - running - sum(gpu in on for on in state.blockers if on is not None)

    def _blocker_steps(self, state: _State, blocker: Blocker, on: tuple[int, ...] | None) -> Iterator[tuple[str, Any]]:
        if on is None:
            return
        for gpu in blocker.gpus:
            if gpu not in on and self._free_slots(state, gpu) > 0:
                yield f"starts on GPU {gpu}", tuple(sorted((*on, gpu)))
        if len(on) == len(blocker.gpus) and blocker.ends:
            yield "ends", None
