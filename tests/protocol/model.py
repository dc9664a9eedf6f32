"""The flag protocol of expert parallelism as threads of reads, writes, releases and guards, with its variants.

docs/expert-parallel.md describes the protocol. A launch of one rank is a set of threads that start together and are over
together, as the CTAs of a kernel are:

- two CTAs: read everybody's ids, and count as dispatched then; the first has sent its rank's ids before, and writes tokens into
  the images of their owners, or as rows into its own memory, where the owners read them;
- a signaller: when both have dispatched, releases the token flags of all ranks;
- a worker: waits for the tokens of all ranks, reads its images, writes results into the sources' slots and releases the column
  flags of all ranks;
- a combiner: waits for the columns of all ranks and reads its slots.

Ids, tokens and results are modelled by the number of their launch: a read that finds another number is the error looked for.
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

    ids_buffers: int = 2
    image_buffers: int = 1
    # Tokens stay with their rank, and are read from there.
    assembles_images: bool = False
    slot_buffers: int = 1
    releases_dispatched: bool = True
    releases_columns: bool = True
    # A rank whose experts have no tokens announces its columns at once, without waiting for anything but the ids.
    idle_at_once: bool = True
    # The combiner reads when all ranks are done with their columns.
    waits_for_columns: bool = True
    # Who counts the launch: the last CTA to have read the epoch, or the combiner when it is through.
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
    ids, image = f"ids{launch % p.ids_buffers}", f"images{launch % p.image_buffers}"
    slot = f"slots{launch % p.slot_buffers}"
    has_tokens = lambda s, d: (launch, s, d) in sends  # noqa: E731
    # Each CTA reads the epoch by itself when it starts: what comes after must be of the launch it belongs to.
    epoch = [Step(reads=((f"epoch[{rank}]", launch - 1),))] if p.reads_epoch else []
    # A word of ids is there when it has the launch's number; a later number would be waited for in vain.
    read_ids = [Step(((f"{ids}[{rank}][{s}]", launch),), ((f"{ids}[{rank}][{s}]", launch),)) for s in others]
    dispatched = f"dispatched[{rank}]"
    count = Step(stores=(Store(dispatched, 1, is_release=p.releases_dispatched, is_addition=True),))

    first = [*epoch, *(Step(stores=(Store(f"{ids}[{d}][{rank}]", launch),)) for d in others), *read_ids]
    if p.assembles_images:
        first.append(Step(stores=(Store(f"rows[{rank}]", launch),)))
    else:
        first += [Step(stores=(Store(f"{image}[{d}][{rank}]", launch),)) for d in others if has_tokens(rank, d)]
    first.append(count)
    second = [*epoch, *read_ids, count]
    all_dispatched = ((dispatched, 2 * launch),)
    signaller = [Step(all_dispatched, stores=(Store(f"tokens[{d}][{rank}]", launch),)) for d in others]

    announce = [Step(stores=(Store(f"columns[{d}][{rank}]", launch, is_release=p.releases_columns),)) for d in others]
    sources = [s for s in others if has_tokens(s, rank)]
    if sources or not p.idle_at_once:
        arrived = (*all_dispatched, *((f"tokens[{rank}][{s}]", launch) for s in others))
        worker = [Step(arrived)]
        for s in sources:
            tokens = f"rows[{s}]" if p.assembles_images else f"{image}[{rank}][{s}]"
            worker.append(Step(reads=((tokens, launch),)))
            worker.append(Step(stores=(Store(f"{slot}[{s}][{rank}]", launch),)))
    else:
        worker = list(read_ids)
    worker += announce

    done = tuple((f"columns[{rank}][{d}]", launch) for d in others) if p.waits_for_columns else ()
    combiner = [Step(done)]
    combiner += [Step(reads=((f"{slot}[{rank}][{d}]", launch),)) for d in others if has_tokens(rank, d)]
    if not p.epoch_by_last:
        combiner.append(Step(stores=(Store(f"epoch[{rank}]", launch, is_release=True),)))
    return [first, second, signaller, worker, combiner]
