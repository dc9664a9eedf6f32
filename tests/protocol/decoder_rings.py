"""Walks through all orders of events where a cluster's thread blocks decode weights (jax_megamoe/cuda/kernels/weight_decoder.cuh).

Each has two rings: codes land in one, and decoders take them to the other, where tokens land. Of weights that both need,
each decodes a half, and copies it from its stage to the other block's.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.protocol.cluster_ring import Unit
from tests.protocol.search import Outcome, Wrong, search


class Rings(NamedTuple):
    """The sizes of the rings and what holds their steps together; a test takes one of the latter away."""

    codes: int = 2
    stages: int = 2
    notes: int = 2  # of units that the token producer has not read
    releases_to_both: bool = True
    waits_at_the_end: bool = True


class _Block(NamedTuple):
    noted: int = 0  # units that the weight producer has told the token producer of
    read: int = 0
    loaded: int = 0  # stages whose codes have landed
    decoded: int = 0
    asked: int = 0  # ... whose tokens have been asked for
    consumed: int = 0
    heard: int = 0  # ... that the other block's consumers have left, as far as this one knows
    ended: bool = False


class _State(NamedTuple):
    blocks: tuple[_Block, _Block]
    # Copies between the blocks: ("weights" or "tokens", to, stage), on their way or landed and not used yet.
    flying: frozenset[tuple[str, int, int]]
    landed: frozenset[tuple[str, int, int]]


def explore(rings: Rings, plan: list[Unit]) -> Outcome:
    """Walks through all orders of events of two blocks with these units."""
    start = _State((_Block(), _Block()), frozenset(), frozenset())
    return search(start, _Walk(rings, plan).moves, lambda state: all(block.ended for block in state.blocks))


class _Walk:
    def __init__(self, rings: Rings, plan: list[Unit]) -> None:
        self.rings = rings
        self.stages = [(number, unit) for number, unit in enumerate(plan) for _ in range(unit.stages)]

    def moves(self, state: _State) -> Iterator[tuple[str, _State]]:
        for copy in state.flying:
            yield f"lands: {copy}", self._land(state, copy)
        for me in (0, 1):
            for following in self._block_moves(state, me):
                yield f"block {me} is at {following.blocks[me]}", following

    def _land(self, state: _State, copy: tuple[str, int, int]) -> _State:
        kind, to, stage = copy
        receiver = state.blocks[to]
        if receiver.ended:
            raise Wrong(f"{kind} arrive at a block that has ended")
        if receiver.consumed <= stage - self.rings.stages:
            raise Wrong(f"{kind} overwrite a stage")
        return state._replace(flying=state.flying - {copy}, landed=state.landed | {copy})

    def _block_moves(self, state: _State, me: int) -> Iterator[_State]:
        block, other, total = state.blocks[me], state.blocks[1 - me], len(self.stages)
        if block.heard < other.consumed:
            if block.ended:
                raise Wrong("a release arrives at a block that has ended")
            yield self._changed(state, me, heard=block.heard + 1)
        if block.ended:
            return
        stage = block.loaded
        if stage < total and block.decoded > stage - self.rings.codes:
            unit = self.stages[stage][0]
            if unit < block.noted:
                yield self._changed(state, me, loaded=stage + 1)
            elif block.noted - block.read < self.rings.notes:
                yield self._changed(state, me, loaded=stage + 1, noted=unit + 1)
        stage = block.asked
        if block.read < block.noted and self.stages[stage][0] == block.read:
            yield self._changed(state, me, read=block.read + 1)
        if stage < total and self.stages[stage][0] < block.read and self._left(block, stage - self.rings.stages):
            yield self._sent(state, me, "tokens", stage, self.stages[stage][1].shares_tokens, asked=stage + 1)
        stage = block.decoded
        if stage < block.loaded and self._left(block, stage - self.rings.stages):
            self._check_source(state, me, stage - self.rings.stages)
            yield self._sent(state, me, "weights", stage, self.stages[stage][1].shares_weights, decoded=stage + 1)
        stage = block.consumed
        if stage < total and stage < min(block.decoded, block.asked) and self._has_copies(state, me):
            used = {("weights", me, stage), ("tokens", me, stage)}
            yield self._changed(state._replace(landed=state.landed - used), me, consumed=stage + 1)
        if stage == total and (self._left(block, total - 1) or not self.rings.waits_at_the_end):
            for last in range(max(0, total - self.rings.stages), total):
                self._check_source(state, me, last)
            yield self._changed(state, me, ended=True)

    def _has_copies(self, state: _State, me: int) -> bool:
        stage = state.blocks[me].consumed
        unit = self.stages[stage][1]
        return (not unit.shares_weights or ("weights", me, stage) in state.landed) and (
            not unit.shares_tokens or ("tokens", me, stage) in state.landed
        )

    def _left(self, block: _Block, stage: int) -> bool:
        """Whether the consumers of both blocks have released the stage, and the block knows."""
        known = min(block.consumed, block.heard) if self.rings.releases_to_both else block.consumed
        return stage < known

    @staticmethod
    def _check_source(state: _State, me: int, stage: int) -> None:
        if ("weights", 1 - me, stage) in state.flying:
            raise Wrong("what a copy reads is overwritten")

    def _sent(self, state: _State, me: int, kind: str, stage: int, shared: bool, **changes: Any) -> _State:
        copies = {(kind, 1 - me, stage)} if shared else set()
        return self._changed(state._replace(flying=state.flying | copies), me, **changes)

    @staticmethod
    def _changed(state: _State, me: int, **changes: Any) -> _State:
        blocks = list(state.blocks)
        blocks[me] = blocks[me]._replace(**changes)
        return state._replace(blocks=(blocks[0], blocks[1]))
