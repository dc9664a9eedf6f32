"""Walks through all orders of events in the rings of a cluster of two thread blocks (jax_megamoe/cuda/kernels/cluster.cuh)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.protocol.search import Outcome, Wrong, search

BOTH = (0, 1)


class Unit(NamedTuple):
    """What a ticket stands for: so many stages, whose weights or tokens the blocks bring to each other."""

    stages: int
    shares_weights: bool = False
    shares_tokens: bool = False


class Ring(NamedTuple):
    """The sizes of the rings and what holds their steps together; a test takes one of the latter away."""

    stages: int = 2
    in_flight: int = 1
    ticket_slots: int = 4
    releases_to_both: bool = True
    waits_at_the_end: bool = True


class _Block(NamedTuple):
    claimed: int = 0  # stages that the weight producer has taken
    asked: int = 0  # ... that the token producer has
    consumed: int = 0
    heard: int = 1  # tickets; the first is the block's own
    ended: bool = False


class _State(NamedTuple):
    blocks: tuple[_Block, _Block]
    told: int  # tickets that block 0 has told
    # On their way: ("weights" or "tokens" or "release", to, from, stage) and ("ticket", to, from, number).
    flying: frozenset[tuple[str, int, int, int]]
    # What has arrived and matters still.
    here: frozenset[tuple[str, int, int, int]]


def explore(ring: Ring, plans: tuple[list[Unit], list[Unit]]) -> Outcome:
    """Walks through all orders of events. `plans` has each block's units, which ought to be the same."""
    start = _State((_Block(), _Block()), 1, frozenset(), frozenset())
    return search(start, _Walk(ring, plans).moves, lambda state: all(block.ended for block in state.blocks))


class _Walk:
    def __init__(self, ring: Ring, plans: tuple[list[Unit], list[Unit]]) -> None:
        self.ring = ring
        # By block: for each stage, the number of its unit, and the unit.
        self.stages = [[(n, unit) for n, unit in enumerate(plan) for _ in range(unit.stages)] for plan in plans]

    def moves(self, state: _State) -> Iterator[tuple[str, _State]]:
        for event in state.flying:
            yield f"arrives: {event}", self._arrive(state, event)
        for block in BOTH:
            if not state.blocks[block].ended:
                for following in self._block_moves(state, block):
                    yield f"block {block} is at {following.blocks[block]}", following

    def _arrive(self, state: _State, event: tuple[str, int, int, int]) -> _State:
        kind, to, source, number = event
        receiver = state.blocks[to]
        if receiver.ended:
            raise Wrong(f"{kind} arrives at a block that has ended")
        if kind in ("weights", "tokens") and receiver.consumed <= number - self.ring.stages:
            raise Wrong(f"{kind} overwrite a stage")
        if kind == "ticket":
            slot = number % self.ring.ticket_slots
            if any(k == "ticket" and n % self.ring.ticket_slots == slot for k, _, _, n in state.here):
                raise Wrong("a ticket overwrites another")
        return state._replace(flying=state.flying - {event}, here=state.here | {event})

    def _block_moves(self, state: _State, me: int) -> Iterator[_State]:
        block, stages = state.blocks[me], self.stages[me]
        if block.claimed < len(stages):
            yield from self._claim(state, me)
        if block.asked < block.claimed:
            stage = block.asked
            parts = self._parts("tokens", me, stage, stages[stage][1].shares_tokens)
            yield self._changed(state, me, parts, asked=stage + 1)
        stage = block.consumed
        if stage < len(stages) and block.claimed > stage and block.asked > stage and self._full(state, me, stage):
            landed = {
                event
                for event in state.here
                if event[0] in ("weights", "tokens") and event[1] == me and event[3] == stage
            }
            releases = {("release", to, me, stage) for to in (BOTH if self.ring.releases_to_both else (me,))}
            yield self._changed(state._replace(here=state.here - landed), me, releases, consumed=stage + 1)
        last = range(max(0, len(stages) - self.ring.stages), len(stages))
        left = all(self._left(state, me, stage) for stage in last) or not self.ring.waits_at_the_end
        if block.consumed == len(stages) and left:
            yield self._changed(state, me, set(), ended=True)

    def _claim(self, state: _State, me: int) -> Iterator[_State]:
        ring, block, stages = self.ring, state.blocks[me], self.stages[me]
        stage = block.claimed
        number, unit = stages[stage]
        if number >= block.heard:  # rank 1: the ticket has to be here
            ticket = ("ticket", me, 0, number)
            if ticket in state.here:
                yield self._changed(state._replace(here=state.here - {ticket}), me, set(), heard=number + 1)
            return
        is_last = stage + 1 == len(stages) or stages[stage + 1][0] != number
        if me == 0 and is_last and state.told == number + 1 and stage + 1 < len(stages):
            told = self._changed(state, me, {("ticket", 1, 0, number + 1)}, heard=number + 2)
            yield told._replace(told=number + 2)
            return
        if stage >= ring.in_flight and not self._weights_full(state, me, stage - ring.in_flight):
            return
        before = stage - ring.stages
        if before >= 0 and not self._left(state, me, before):
            return
        state = state._replace(here=state.here - self._releases(me, before))
        yield self._changed(state, me, self._parts("weights", me, stage, unit.shares_weights), claimed=stage + 1)

    def _changed(self, state: _State, me: int, events: set[tuple[str, int, int, int]], **changes: Any) -> _State:
        blocks = list(state.blocks)
        blocks[me] = blocks[me]._replace(**changes)
        # What a block does to itself happens at once: later is as if it had done it later.
        own = {event for event in events if event[1] == me}
        return _State((blocks[0], blocks[1]), state.told, state.flying | (events - own), state.here | own)

    @staticmethod
    def _parts(kind: str, me: int, stage: int, shared: bool) -> set[tuple[str, int, int, int]]:
        return {(kind, to, me, stage) for to in (BOTH if shared else (me,))}

    def _weights_full(self, state: _State, me: int, stage: int) -> bool:
        return stage < state.blocks[me].consumed or self._landed(state, "weights", me, stage)

    def _full(self, state: _State, me: int, stage: int) -> bool:
        return self._landed(state, "weights", me, stage) and self._landed(state, "tokens", me, stage)

    def _landed(self, state: _State, kind: str, me: int, stage: int) -> bool:
        unit = self.stages[me][stage][1]
        shared = unit.shares_weights if kind == "weights" else unit.shares_tokens
        return all((kind, me, source, stage) in state.here for source in (BOTH if shared else (me,)))

    def _left(self, state: _State, me: int, stage: int) -> bool:
        """Whether the consumers of both blocks have released the stage here."""
        return self._releases(me, stage) <= state.here

    def _releases(self, me: int, stage: int) -> frozenset[tuple[str, int, int, int]]:
        return frozenset(("release", me, one, stage) for one in (BOTH if self.ring.releases_to_both else (me,)))
