"""Walks through all orders in which the steps of a protocol can happen, and says what goes wrong in which order."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from tests.protocol.model import Protocol, Sends, Step, Store, all_send, threads_of
from tests.protocol.search import Outcome, Wrong, search


class _Rank(NamedTuple):
    launch: int
    counters: tuple[int, ...]  # of the next step of each thread
    pending: tuple[tuple[int, Store], ...]  # (thread, store) that are issued and not visible yet, in order


class _State(NamedTuple):
    ranks: tuple[_Rank, ...]
    memory: tuple[int, ...]


def explore(
    protocol: Protocol,
    num_ranks: int = 2,
    num_launches: int = 3,
    delayed_stores: bool = True,
    sends: Sends | None = None,
    stops: tuple[int, int] | None = None,
) -> Outcome:
    """Depth first through all states; ends at the first error. `stops` is a rank and the launch it never begins.

    With `delayed_stores` a store becomes visible at any time after its step, those of one thread in any order, but for
    two to one cell and for releases, which come after all before them; the end of a launch orders nothing. Without,
    stores are visible at once and happen in one step with the read before them. That loses no error where flags and
    counters are released: each cell has one writer, and nobody waits for a flag not to be there, so that every run has
    one like it in which a store came earlier, right after the read that it follows: it lets others go on that much
    sooner, and overwrites what they have still to read that much sooner.
    """
    return _Explorer(protocol, num_ranks, num_launches, delayed_stores, sends, stops).run()


class _Explorer:
    def __init__(
        self,
        protocol: Protocol,
        num_ranks: int,
        num_launches: int,
        delayed_stores: bool,
        sends: Sends | None,
        stops: tuple[int, int] | None,
    ) -> None:
        self.stops = stops
        self.protocol, self.num_ranks, self.num_launches = protocol, num_ranks, num_launches
        self.delayed = delayed_stores
        self.sends = all_send(num_ranks, num_launches) if sends is None else sends
        self.programs = {
            (rank, launch): threads_of(protocol, num_ranks, rank, launch, self.sends)
            for rank in range(num_ranks)
            for launch in range(1, num_launches + 1)
        }
        if not delayed_stores:
            self.programs = {key: [_fuse(thread) for thread in threads] for key, threads in self.programs.items()}
        self.cells: dict[str, int] = {}
        for threads in self.programs.values():
            for step in (step for thread in threads for step in thread):
                for name in (*(c for c, _ in step.guards), *(c for c, _ in step.reads), *(s.cell for s in step.stores)):
                    self.cells.setdefault(name, len(self.cells))
        # Ranks in a ring are alike: a state and what it turns into when all ranks move on by one are one state.
        self.rotations = [self._rotation(by) for by in range(num_ranks)] if sends is None and stops is None else []

    def _rotation(self, by: int) -> list[int]:
        """For each cell, the cell whose value it has when rank r becomes rank r + by."""
        source = [0] * len(self.cells)
        for name, place in self.cells.items():
            moved = re.sub(r"\[(\d+)\]", lambda match: f"[{(int(match[1]) + by) % self.num_ranks}]", name)
            source[self.cells[moved]] = place
        return source

    def _canonical(self, state: _State) -> _State:
        if self.delayed or len(self.rotations) < 3:
            return state  # stores that are pending name cells, too; and two ranks are few
        turned = [
            _State(
                (*state.ranks[self.num_ranks - by :], *state.ranks[: self.num_ranks - by]),
                tuple(state.memory[place] for place in source),
            )
            for by, source in enumerate(self.rotations)
        ]
        return min(turned)

    def run(self) -> Outcome:
        start = _State(tuple(self._begin(rank, 1) for rank in range(self.num_ranks)), (0,) * len(self.cells))
        return search(
            start,
            lambda state: ((label, self._canonical(following)) for label, following in self._moves(state)),
            lambda state: all(rank.launch > self.num_launches for rank in state.ranks),
        )

    def _begin(self, rank: int, launch: int, pending: tuple[tuple[int, Store], ...] = ()) -> _Rank:
        while launch <= self.num_launches and not any(self.programs[rank, launch]):
            launch += 1  # nothing to do in it
        num_threads = len(self.programs.get((rank, launch), []))
        return _Rank(launch, (0,) * num_threads, pending)

    def _moves(self, state: _State) -> Iterator[tuple[str, _State]]:
        for number, rank in enumerate(state.ranks):
            yield from self._visibility(state, number, rank)
            if rank.launch > self.num_launches or (number, rank.launch) == self.stops:
                continue
            threads = self.programs[number, rank.launch]
            for index, (thread, counter) in enumerate(zip(threads, rank.counters, strict=True)):
                if counter == len(thread):
                    continue
                step = thread[counter]
                if all(state.memory[self.cells[cell]] >= least for cell, least in step.guards):
                    yield self._take(state, number, rank, index, step)

    def _take(self, state: _State, number: int, rank: _Rank, index: int, step: Step) -> tuple[str, _State]:
        where = f"rank {number}, launch {rank.launch}, thread {index}"
        for cell, wanted in step.reads:
            found = state.memory[self.cells[cell]]
            if found != wanted:
                raise Wrong(f"{where}: {cell} is {found}, wanted {wanted}")
        memory, pending = state.memory, rank.pending
        for store in step.stores:
            if self.delayed:
                pending = (*pending, (index, store))
            else:
                memory = self._stored(memory, store)
        counters = tuple(c + (i == index) for i, c in enumerate(rank.counters))
        following = rank._replace(counters=counters, pending=pending)
        threads = self.programs[number, rank.launch]
        if all(c == len(thread) for c, thread in zip(counters, threads, strict=True)):
            if self.protocol.epoch_by_last and self.protocol.reads_epoch:
                memory = self._stored(memory, Store(f"epoch[{number}]", rank.launch))
            following = self._begin(number, rank.launch + 1, pending)
        ranks = tuple(following if i == number else other for i, other in enumerate(state.ranks))
        return f"{where}: {_text(step)}", _State(ranks, memory)

    def _visibility(self, state: _State, number: int, rank: _Rank) -> Iterator[tuple[str, _State]]:
        for place, (thread, store) in enumerate(rank.pending):
            before = [other for owner, other in rank.pending[:place] if owner == thread]
            if any(store.is_release or other.cell == store.cell for other in before):
                continue
            following = rank._replace(pending=rank.pending[:place] + rank.pending[place + 1 :])
            ranks = tuple(following if i == number else other for i, other in enumerate(state.ranks))
            yield f"rank {number}: {store.cell} is visible", _State(ranks, self._stored(state.memory, store))

    def _stored(self, memory: tuple[int, ...], store: Store) -> tuple[int, ...]:
        place = self.cells[store.cell]
        value = memory[place] + store.value if store.is_addition else store.value
        return (*memory[:place], value, *memory[place + 1 :])


def _fuse(thread: list[Step]) -> list[Step]:
    """The thread with stores in one step with the read before them."""
    fused: list[Step] = []
    for step in thread:
        if fused and not step.guards and not step.reads and step.stores:
            fused[-1] = fused[-1]._replace(stores=(*fused[-1].stores, *step.stores))
        else:
            fused.append(step)
    return fused


def _text(step: Step) -> str:
    parts = [f"reads {cell}" for cell, _ in step.reads]
    parts += [f"{'adds to' if store.is_addition else 'stores'} {store.cell}" for store in step.stores]
    return ", ".join(parts) or "starts"
