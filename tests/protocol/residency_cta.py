"""The steps of a CTA in launches of which only some CTAs are there (`residency.py` says what happens)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.protocol.residency import NOTHING, Cta, Mechanism, Memory, Rank, Scene, put
from tests.protocol.search import Wrong


class Step(NamedTuple):
    """A step of a CTA, and whether it commutes with all that others can do meanwhile."""

    label: str
    rank: Rank
    commutes: bool = False


class CtaSteps:
    """What the CTAs of a rank can do next."""

    def __init__(self, scene: Scene, mechanism: Mechanism) -> None:
        self.scene, self.mechanism, self.ranks = scene, mechanism, range(len(scene.ctas))

    def of_rank(self, r: int, rank: Rank, memories: tuple[Memory, ...], has_slot: bool) -> list[Step]:
        steps = []
        for b, cta in enumerate(rank.ctas):
            where = f"rank {r}, launch {rank.memory.launch}, CTA {b}"
            try:
                possible = [*self._consumers(r, rank, b, memories), *self._producer(r, rank, b)]
            except Wrong as wrong:
                raise Wrong(f"{where}: {wrong}") from None
            if cta.consumers == "absent" and has_slot:
                possible.append(self._start(rank, b))
            steps += [step._replace(label=f"{where} {step.label}", rank=_next_launch(step.rank)) for step in possible]
        return steps

    def _start(self, rank: Rank, b: int) -> Step:
        parts = range(len(rank.ctas))
        if self.mechanism.ids_to_all:
            words = {(d, b) for d in self.ranks}
        else:
            words = {(d, part) for d in self.ranks for part in parts if d % len(parts) == b}
        started = _with(rank, b, consumers="claims", producer="claims")
        return Step(f"starts and sends ids {sorted(words)}", _write(started, sent=rank.memory.sent | words))

    def _consumers(self, r: int, rank: Rank, b: int, memories: tuple[Memory, ...]) -> Iterator[Step]:
        m, cta, launch = self.mechanism, rank.ctas[b], rank.memory.launch
        match cta.consumers:
            case "claims":
                won = rank.shares[b] == launch - 1
                claimed = rank._replace(shares=put(rank.shares, b, rank.shares[b] + 1))
                after = "waits for ids" if won or not m.shares.returned else "returns its claim"
                share = b if won or not m.shares.heeded else NOTHING
                yield Step(f"claims its share, {won=}", _with(claimed, b, consumers=after, share=share), not won)
            case "returns its claim":
                returned = rank._replace(shares=put(rank.shares, b, rank.shares[b] - 1))
                yield Step("returns its share", _with(returned, b, consumers="waits for ids"), True)
            case "waits for ids":
                yield from self._read_ids(r, rank, b, memories)
            case "stores its claim":
                stored = rank._replace(shares=put(rank.shares, cta.share, launch))
                yield Step(f"stores a claim of share {cta.share}", _with(stored, b, consumers="dispatches"))
            case "dispatches" if cta.share != NOTHING:
                if cta.share in rank.memory.dispatched:
                    raise Wrong(f"share {cta.share} is dispatched twice")
                dispatched = _write(rank, dispatched=rank.memory.dispatched | {cta.share})
                yield Step(f"dispatches share {cta.share}", _with(dispatched, b, share=NOTHING), True)
            case "dispatches":
                unclaimed = [place for place, claim in enumerate(rank.shares) if claim == launch - 1]
                if not unclaimed or not m.shares.taken_over:
                    yield Step("begins to multiply", _with(rank, b, consumers="multiplies"), True)
                    return
                for place in unclaimed:
                    claimed = rank._replace(shares=put(rank.shares, place, launch)) if m.shares.swapped else rank
                    after = "dispatches" if m.shares.swapped else "stores its claim"
                    yield Step(f"takes over share {place}", _with(claimed, b, consumers=after, share=place))
            case "multiplies" if cta.queue:
                yield from self._multiply(r, rank, b, memories)
            case "multiplies" if cta.producer == "ended":
                if all(self._columns(d, memories[d]) >= launch for d in self.ranks):
                    for d in self.ranks:
                        for unit in self.scene.down_units(d):
                            found = memories[d].stamp(unit in memories[d].multiplied)
                            _expect(f"result {unit} of rank {d}", found, launch)
                    yield Step("sums and ends", _with(rank, b, consumers="ended"))

    def _read_ids(self, r: int, rank: Rank, b: int, memories: tuple[Memory, ...]) -> Iterator[Step]:
        m, cta, launch = self.mechanism, rank.ctas[b], rank.memory.launch
        order = list(self.ranks) if m.own_ids_in_turn else [*(s for s in self.ranks if s != r), r]
        source = order[cta.heard]
        found = memories[source].ids(r, self.scene.ctas[source], launch, m.id_places)
        if found >= launch:
            _expect(f"ids of rank {source}", found, launch)
            has_all = source == order[-1]
            if has_all and self.scene.num_units(r) == 0 and (m.idle_by_first or b == 0):
                rank = _write(rank, announced_idle=True)
            after = "dispatches" if has_all else cta.consumers
            yield Step(f"reads ids of rank {source}", _with(rank, b, consumers=after, heard=cta.heard + 1), True)
        elif source == r and m.ids_taken_over:
            missing = [part for part in range(len(rank.ctas)) if (r, part) not in rank.memory.sent]
            words = {(d, part) for d in self.ranks for part in missing}
            yield Step(f"sends ids of CTAs {missing}", _write(rank, sent=rank.memory.sent | words))

    def _multiply(self, r: int, rank: Rank, b: int, memories: tuple[Memory, ...]) -> Iterator[Step]:
        launch, multiplied = rank.memory.launch, rank.memory.multiplied
        unit, *others = rank.ctas[b].queue
        is_down = unit in self.scene.down_units(r)
        if not multiplied.issuperset(self.scene.waits_for(r, unit)):
            return
        if not is_down:
            images = {
                (s, share): memories[s].stamp(share in memories[s].dispatched)
                for s in self.ranks
                for share in range(self.scene.ctas[s])
            }
            if any(found < launch for found in images.values()):
                return  # the flag of the tokens comes with the last share
            for (s, share), found in images.items():
                _expect(f"share {share} of rank {s}", found, launch)
        if unit in multiplied:
            raise Wrong(f"unit {unit} is multiplied twice")
        rank = _write(rank, multiplied=multiplied | {unit})
        commutes = is_down and self.scene.slots_of_rings is None  # nothing waits for it but its rank's end
        yield Step(f"multiplies unit {unit}", _with(rank, b, queue=tuple(others)), commutes)

    def _columns(self, d: int, memory: Memory) -> int:
        """The flag of a rank's results, which comes with the last of them."""
        is_idle = self.scene.num_units(d) == 0
        return memory.stamp(
            memory.announced_idle if is_idle else memory.multiplied.issuperset(self.scene.down_units(d))
        )

    def _producer(self, r: int, rank: Rank, b: int) -> Iterator[Step]:
        m, cta, launch = self.mechanism, rank.ctas[b], rank.memory.launch
        num_places = min(len(rank.ctas), self.scene.num_units(r))
        match cta.producer:
            case "claims":
                won = rank.units[b] == launch - 1
                claimed = rank._replace(units=put(rank.units, b, rank.units[b] + 1))
                after = "waits for the plan" if won or not m.units.returned else "returns its claim"
                ticket = b if won or not m.units.heeded else NOTHING
                yield Step(f"claims its first unit, {won=}", _with(claimed, b, producer=after, ticket=ticket), not won)
            case "returns its claim":
                returned = rank._replace(units=put(rank.units, b, rank.units[b] - 1))
                yield Step("returns its first unit", _with(returned, b, producer="waits for the plan"), True)
            case "waits for the plan" if cta.heard == len(self.ranks):
                has_first = cta.ticket != NOTHING
                planned = self._offer(r, rank, b, cta.ticket) if has_first else _with(rank, b, producer="draws")
                yield Step("has the plan", planned, True)
            case "draws":
                ticket = min(len(rank.ctas) + rank.drawn, self.scene.num_units(r))
                is_unit = ticket < self.scene.num_units(r)
                drawn = rank._replace(drawn=rank.drawn + is_unit)
                yield Step(f"draws {ticket}", self._offer(r, drawn, b, ticket), not is_unit)
            case "looks" if cta.looks == num_places:
                yield Step("has looked", self._queue(r, rank, b, cta.ticket), True)
            case "looks":
                place = cta.looks if m.looks_in_order else num_places - 1 - cta.looks
                looked = _with(rank, b, looks=cta.looks + 1)
                if rank.units[place] != launch - 1 or not m.units.taken_over:
                    yield Step(f"lets unit {place} be", looked, True)
                elif m.units.swapped:
                    claimed = looked._replace(units=put(rank.units, place, launch))
                    yield Step(f"takes over unit {place}", _with(claimed, b, queue=(*cta.queue, place)))
                else:
                    yield Step(f"finds unit {place} unclaimed", _with(looked, b, producer="stores its claim"))
            case "stores its claim":
                place = cta.looks - 1 if m.looks_in_order else num_places - cta.looks
                stored = rank._replace(units=put(rank.units, place, launch))
                queued = _with(stored, b, producer="looks", queue=(*cta.queue, place))
                yield Step(f"stores a claim of unit {place}", queued)

    def _offer(self, r: int, rank: Rank, b: int, ticket: int) -> Rank:
        """The ticket is next, unless the CTA has to look at the first units before."""
        is_end = ticket >= self.scene.num_units(r)
        is_down = ticket in self.scene.down_units(r)
        is_in_ring = not is_end and not is_down and bool(self.scene.waits_for(r, ticket))
        m = self.mechanism
        looks = is_end and m.looks_before_end or is_down and m.looks_before_down or is_in_ring and m.looks_before_ring
        if looks and rank.ctas[b].looks == 0:
            return _with(rank, b, producer="looks", ticket=ticket)
        return self._queue(r, rank, b, ticket)

    def _queue(self, r: int, rank: Rank, b: int, ticket: int) -> Rank:
        if ticket >= self.scene.num_units(r):
            return _with(rank, b, producer="ended", ticket=NOTHING)
        return _with(rank, b, producer="draws", ticket=NOTHING, queue=(*rank.ctas[b].queue, ticket))


def _expect(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise Wrong(f"{what} are {found}, wanted {wanted}")


def _with(rank: Rank, b: int, **changes: Any) -> Rank:
    """The rank with changes to CTA b."""
    return rank._replace(ctas=put(rank.ctas, b, rank.ctas[b]._replace(**changes)))


def _write(rank: Rank, **changes: Any) -> Rank:
    return rank._replace(memory=rank.memory._replace(**changes))


def _next_launch(rank: Rank) -> Rank:
    """The rank as it is, or in its next launch if all CTAs have ended."""
    if any(cta.consumers != "ended" for cta in rank.ctas):
        return rank
    return Rank((Cta(),) * len(rank.ctas), rank.shares, rank.units, memory=Memory(rank.memory.launch + 1))
