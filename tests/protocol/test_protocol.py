"""The flag protocol of expert parallelism, all interleavings of it, and variants that have to fail."""

import re

import pytest

from tests.protocol.explorer import explore
from tests.protocol.model import Protocol, Sends
from tests.support.cases import exhaustive

# Rank 0 sends in launches 1 and 3 only, and rank 1 never.
SPARSE = frozenset({(1, 0, 1), (3, 0, 1)})
NOBODY: Sends = frozenset()

# What the protocol is, and changes that cost nothing in safety.
SOUND = {
    "as it is": Protocol(),
    "images are assembled": Protocol(assembles_images=True),
    "images for each parity": Protocol(image_buffers=2),
    "slots for each parity": Protocol(slot_buffers=2),
    "one set of ids, and idle ranks wait like the others": Protocol(ids_buffers=1, idle_at_once=False),
}
# With who sends tokens, where that matters: None means everybody to everybody.
BROKEN: dict[str, tuple[Protocol, Sends | None, str]] = {
    "one set of ids": (Protocol(ids_buffers=1), NOBODY, r"ids0\[\d\]\[\d\] is (\d), wanted (\d)"),
    "dispatch not released": (Protocol(releases_dispatched=False), None, r"images0\[\d\]\[\d\] is (\d), wanted (\d)"),
    "rows not released": (
        Protocol(assembles_images=True, releases_dispatched=False),
        None,
        r"rows\[\d\] is (\d), wanted (\d)",
    ),
    "columns not released": (Protocol(releases_columns=False), None, r"slots0\[\d\]\[\d\] is (\d), wanted (\d)"),
    "combine does not wait": (Protocol(waits_for_columns=False), None, r"slots0\[\d\]\[\d\] is (\d), wanted (\d)"),
    "epoch counted before all CTAs have read it": (
        Protocol(epoch_by_last=False),
        NOBODY,
        r"epoch\[\d\] is (\d), wanted (\d)",
    ),
}


@pytest.mark.parametrize("sends", [None, SPARSE, NOBODY], ids=["all send", "some send", "nobody sends"])
@pytest.mark.parametrize("protocol", SOUND.values(), ids=SOUND)
def test_two_ranks(protocol, sends):
    outcome = explore(protocol, num_ranks=2, num_launches=3, delayed_stores=False, sends=sends)
    assert outcome.error is None, outcome.trace
    assert outcome.num_states > 100


@pytest.mark.parametrize("protocol", SOUND.values(), ids=SOUND)
def test_two_ranks_with_delayed_stores(protocol):
    outcome = explore(protocol, num_ranks=2, num_launches=3, delayed_stores=True)
    assert outcome.error is None, outcome.trace
    assert outcome.num_states > 1_000


@pytest.mark.parametrize(
    "sends",
    [SPARSE, exhaustive(NOBODY)],
    ids=["some send", "nobody sends"],
)
def test_idle_ranks_with_delayed_stores(sends):
    outcome = explore(Protocol(), num_ranks=2, num_launches=3, delayed_stores=True, sends=sends)
    assert outcome.error is None, outcome.trace
    assert outcome.num_states > 10_000


@pytest.mark.parametrize("sends", [None, SPARSE], ids=["all send", "some send"])
def test_three_ranks(sends):
    outcome = explore(Protocol(reads_epoch=False), num_ranks=3, num_launches=3, delayed_stores=False, sends=sends)
    assert outcome.error is None, outcome.trace


@pytest.mark.parametrize(("protocol", "sends", "error"), BROKEN.values(), ids=BROKEN)
def test_broken_variants_are_found(protocol, sends, error):
    outcome = explore(protocol, num_ranks=2, num_launches=3, delayed_stores=True, sends=sends)
    assert outcome.error is not None and re.search(error, outcome.error), outcome


def test_one_set_of_ids_is_overwritten_by_the_next_launch():
    """By a rank that has left a launch in which nobody has tokens, while a CTA of the other has still to read the ids."""
    outcome = explore(Protocol(ids_buffers=1), num_ranks=2, num_launches=3, delayed_stores=False, sends=NOBODY)
    found, wanted = re.findall(r"is (\d), wanted (\d)", str(outcome.error))[0]
    assert int(found) == int(wanted) + 1


def test_a_rank_that_stops_leaves_the_others_waiting():
    """Nothing in the protocol notices: hence the timeout of every wait."""
    outcome = explore(Protocol(), num_ranks=2, num_launches=3, delayed_stores=False, stops=(1, 2))
    assert outcome.error == "nobody can go on"
