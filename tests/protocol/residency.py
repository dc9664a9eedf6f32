"""Launches of which only some CTAs are there: who takes over the work of those that have not started yet.

A launch of rank r has `ctas[r]` CTAs, and its GPU a slot for each of them. Any of them may start first, and any other later,
as soon as a slot is free: kernels of other streams hold slots, too. Such a blocker runs on several GPUs, as a kernel of NCCL
does, and ends when it has a slot on all of them, or never. A GPU has one slot more than blockers that want one: those that
fill a GPU and wait for another, which runs a launch, are beyond help.

A CTA is two threads, which go on independently:

- the consumers send the CTA's part of the rank's ids to all ranks, claim the CTA's share of the dispatch, wait for all ids,
  rank by rank, and dispatch their share and then those that nobody has claimed; when all are claimed they multiply what the
  producer has queued, and at the end wait for the columns of all ranks and sum;
- the weight producer claims the CTA's first unit at once, and queues it and those that it draws. Before it queues its first
  down unit, or one whose image waits for a place, or ends, it looks through the first units of all CTAs and queues those that nobody has claimed.

Gate/up units wait for the tokens of all ranks; down units wait for all gate/up units. Where images go through rings, both take
turns, one chunk after the other: gate/up unit c waits for the gate/up unit and the down unit that had its places before, and
down unit c for gate/up unit c. A claim counts launches. A CTA adds one
to its own; if it finds that somebody has taken over, it subtracts it again and has nothing. Who takes over sets the claim by
compare-and-swap. CTAs wait for a while before they take over: here that is any time at all.

What a step writes is visible at once: residency concerns atomics of one GPU, and `model.py` has the orders of stores. Hence
flags and data are not held apart: what a rank has dispatched or multiplied is what the others find. Not modelled: the count of
the CTAs that have started, which ends the dispatch earlier, and the epoch (a CTA counts after it has claimed).
"""

from dataclasses import dataclass
from typing import NamedTuple

NOTHING = -1


class Claims(NamedTuple):
    """How places are claimed, of shares or of first units; a test takes one of these away."""

    taken_over: bool = True
    swapped: bool = True  # by compare-and-swap, not by a look and a store
    heeded: bool = True  # by the CTA whose place it is
    returned: bool = True  # by a CTA that is late


@dataclass(frozen=True)
class Mechanism:
    """The mechanism (the defaults) and ways to change it."""

    shares: Claims = Claims()
    units: Claims = Claims()
    # Places for ids, which launches take in turn.
    id_places: int = 2
    # Who waits in vain for a word of the own rank's ids sends it.
    ids_taken_over: bool = True
    # A CTA sends its part of the ids to all ranks; or all ids to some ranks, which the CTAs divide among them.
    ids_to_all: bool = True
    # The own rank's ids are waited for when it is their turn among the ranks; or last.
    own_ids_in_turn: bool = True
    # A rank without units announces its columns as soon as any CTA has the ids; or as soon as CTA 0 has.
    idle_by_first: bool = True
    # First units are looked at from the first to the last, before the first down unit and before the end.
    looks_in_order: bool = True
    looks_before_down: bool = True
    looks_before_end: bool = True
    # ... and before the first gate/up unit that waits for another one.
    looks_before_ring: bool = True


class Blocker(NamedTuple):
    """A kernel of another stream."""

    gpus: tuple[int, ...]
    ends: bool = True


@dataclass(frozen=True)
class Scene:
    """What there is to do on each rank, and what stands in the way. Units are numbered as tickets: gate/up units come first."""

    ctas: tuple[int, ...] = (2, 2)
    gate_up: tuple[int, ...] = (2, 2)
    down: tuple[int, ...] = (1, 1)
    # Of the rings of images, those of tokens and of activations; then each chunk has a unit of both kinds, and gate/up units
    # are one chunk further ahead than the first ring has slots.
    slots_of_rings: tuple[int, int] | None = None
    num_launches: int = 2
    blockers: tuple[Blocker, ...] = (Blocker((0, 1)),)
    spare_slots: int = 1  # that blockers leave free on each GPU

    def num_units(self, rank: int) -> int:
        """Gate/up and down units."""
        return self.gate_up[rank] + self.down[rank]

    def tickets(self, rank: int) -> list[tuple[bool, int]]:
        """Whether it is a down unit, and which of its kind, by ticket."""
        ahead = self.slots_of_rings[0] + 1 if self.slots_of_rings else self.gate_up[rank]
        gate_up = [(False, number) for number in range(self.gate_up[rank])]
        down = [(True, number) for number in range(self.down[rank])]
        turns = [unit for pair in zip(down, gate_up[ahead:], strict=False) for unit in pair]
        return [*gate_up[:ahead], *turns, *down[len(turns) // 2 :]]

    def down_units(self, rank: int) -> frozenset[int]:
        """Their tickets."""
        return frozenset(ticket for ticket, (is_down, _) in enumerate(self.tickets(rank)) if is_down)

    def waits_for(self, rank: int, ticket: int) -> frozenset[int]:
        """The units that one needs, besides tokens."""
        tickets = self.tickets(rank)
        is_down, number = tickets[ticket]
        if self.slots_of_rings is None:
            return frozenset(range(self.gate_up[rank])) if is_down else frozenset()
        images, activations = self.slots_of_rings
        wanted = {(False, number)} if is_down else {(False, number - images), (True, number - activations)}
        return frozenset(other for other, unit in enumerate(tickets) if unit in wanted)

    def slots(self, gpu: int) -> int:
        """For the CTAs of a launch and for blockers."""
        return max(self.ctas[gpu], self.spare_slots + sum(gpu in blocker.gpus for blocker in self.blockers))


class Cta(NamedTuple):
    """Where the two threads of a CTA are."""

    consumers: str = "absent"
    heard: int = 0  # ranks whose ids are read
    share: int = NOTHING  # claimed and to be dispatched
    producer: str = "absent"
    ticket: int = NOTHING  # unit that is claimed or drawn, and not yet queued
    looks: int = 0  # first units that were looked at
    queue: tuple[int, ...] = ()


class Memory(NamedTuple):
    """What a rank has done in its launch, as all ranks find it."""

    launch: int = 1
    sent: frozenset[tuple[int, int]] = frozenset()  # (destination, part) of the ids
    dispatched: frozenset[int] = frozenset()
    multiplied: frozenset[int] = frozenset()
    announced_idle: bool = False

    def stamp(self, is_done: bool) -> int:
        """The launch that something was last done in, if it is done once in each."""
        return self.launch - (not is_done)

    def ids(self, destination: int, num_parts: int, launch: int, num_places: int) -> int:
        """The launch whose ids stand where those of `launch` belong."""
        newest = self.stamp(all((destination, part) in self.sent for part in range(num_parts)))
        return newest - (newest - launch) % num_places


class Rank(NamedTuple):
    """A rank in a launch. The claims outlive it."""

    ctas: tuple[Cta, ...]
    shares: tuple[int, ...]
    units: tuple[int, ...]
    drawn: int = 0
    memory: Memory = Memory()


def put[T](values: tuple[T, ...], place: int, value: T) -> tuple[T, ...]:
    """The values, with another one at the place."""
    return (*values[:place], value, *values[place + 1 :])
