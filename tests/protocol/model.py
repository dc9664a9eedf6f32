"""The flag protocol of expert parallelism as threads of reads, writes, releases and guards, with its variants.

docs/expert-parallel.md describes the protocol. A launch of one rank is a set of threads that start together and are over
together, as the CTAs of a kernel are:

- a pusher for each other rank: writes its tokens into that rank's inbox, then releases the flag;
- a worker: reads each inbox, writes results into the source's slots, then adds to the source's counter;
- a late CTA: reads the pair lists in the inboxes like all CTAs do, but has no work of its own to report;
- a combiner: waits for the counter and reads the slots.

Tokens are modelled by the number of their launch: a read that finds another number is the error looked for.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Step(NamedTuple):
    """One step of a thread: possible once all guards hold; then the reads are checked and the stores are issued."""

    guards: tuple[tuple[str, int], ...] = ()  # (cell, least value)
    reads: tuple[tuple[str, int], ...] = ()  # (cell, the only right value)
    stores: tuple["Store", ...] = ()


class Store(NamedTuple):
    """A store or addition. A release becomes visible after everything that its thread stored before it."""

    cell: str
    value: int
    is_release: bool = False
    is_addition: bool = False


@dataclass(frozen=True)
class Protocol:
    """The protocol (the defaults) and ways to change it."""

    inbox_buffers: int = 2
    flag_buffers: int = 1
    slot_buffers: int = 1
    releases_flag: bool = True
    releases_done: bool = True
    # A rank without tokens for a peer sends its flag all the same, and is told when the peer is done.
    empty_takes_part: bool = True
    # The combiner reads when all ranks are done with the source's tokens.
    waits_for_done: bool = True
    # A worker starts on a source when that one's flag is there; otherwise when those of all sources are.
    starts_per_source: bool = False
    # Each CTA tells each source that it has read the inbox; otherwise only who has results does.
    late_reports: bool = False
    # Who counts the launch: the last CTA to end it, or the combiner when it is through.
    epoch_by_last: bool = True
    # Whether CTAs read the epoch from memory, one by one; nobody but the rank itself has to do with it.
    reads_epoch: bool = True


Sends = frozenset[tuple[int, int, int]]  # (launch, source, destination): who has tokens for whom


def all_send(num_ranks: int, num_launches: int) -> Sends:
    """Every rank has tokens for every other in every launch."""
    ranks = range(num_ranks)
    return frozenset((n, s, d) for n in range(1, num_launches + 1) for s in ranks for d in ranks if s != d)


def threads_of(protocol: Protocol, num_ranks: int, rank: int, launch: int, sends: Sends) -> list[list[Step]]:
    """The threads of one launch (counted from 1) of one rank."""
    p = protocol
    others = [(rank + i) % num_ranks for i in range(1, num_ranks)]  # the same seen from every rank
    inbox, slot = f"inbox{launch % p.inbox_buffers}", f"slots{launch % p.slot_buffers}"
    flag = f"flag{launch % p.flag_buffers}"
    takes_part = lambda s, d: p.empty_takes_part or (launch, s, d) in sends  # noqa: E731
    # Each CTA reads the epoch by itself when it starts: what comes after must be of the launch it belongs to.
    epoch = [Step(reads=((f"epoch[{rank}]", launch - 1),))] if p.reads_epoch else []

    pushers = [
        [
            *epoch,
            Step(stores=(Store(f"{inbox}[{d}][{rank}]", launch),)),
            Step(stores=(Store(f"{flag}[{d}][{rank}]", launch, is_release=p.releases_flag),)),
        ]
        for d in others
        if takes_part(rank, d)
    ]
    sources = [s for s in others if takes_part(s, rank)]
    flags = {s: (f"{flag}[{rank}][{s}]", launch) for s in sources}
    guards = {s: (flags[s],) if p.starts_per_source else tuple(flags.values()) for s in sources}
    done = {s: Store(f"done[{s}]", 1, is_release=p.releases_done, is_addition=True) for s in sources}
    worker, late = list(epoch), list(epoch)
    for s in sources:
        worker.append(Step(guards[s], reads=((f"{inbox}[{rank}][{s}]", launch),)))
        worker.append(Step(stores=(Store(f"{slot}[{s}][{rank}]", launch),)))
        worker.append(Step(stores=(done[s],)))
        reports = (done[s],) if p.late_reports else ()
        late.append(Step(guards[s], reads=((f"{inbox}[{rank}][{s}]", launch),), stores=reports))

    # The counter only grows: what it has to reach follows from the launches so far.
    reports_per_launch = 2 if p.late_reports else 1
    target = reports_per_launch * sum(
        p.empty_takes_part or (n, rank, d) in sends for n in range(1, launch + 1) for d in others
    )
    reached = ((f"done[{rank}]", target),) if p.waits_for_done else ()
    combiner = list(epoch)
    combiner += [Step(reached, reads=((f"{slot}[{rank}][{d}]", launch),)) for d in others if takes_part(rank, d)]
    if not p.epoch_by_last:
        combiner.append(Step(reached, stores=(Store(f"epoch[{rank}]", launch, is_release=True),)))
    return [*pushers, worker, late, combiner]
