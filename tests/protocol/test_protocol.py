"""The flag protocol of expert parallelism, all interleavings of it, and variants that have to fail."""

import re
from dataclasses import replace
from typing import Any

import pytest

from protocol.explorer import explore
from protocol.model import Protocol

# Rank 0 sends in launches 1 and 3 only, and rank 1 never.
SPARSE = frozenset({(1, 0, 1), (3, 0, 1)})
NOBODY: frozenset[tuple[int, int, int]] = frozenset()

# What the protocol is, and changes that cost nothing in safety.
SOUND = {
    "as it is": Protocol(),
    "images for each parity": Protocol(image_buffers=2),
    "slots for each parity": Protocol(slot_buffers=2),
    "one set of ids, and idle ranks wait like the others": Protocol(ids_buffers=1, idle_at_once=False),
}
BROKEN = {
    "gathering not released": (Protocol(releases_gathered=False), r"images0\[\d\]\[\d\] is (\d), wanted (\d)"),
    "columns not released": (Protocol(releases_columns=False), r"slots0\[\d\]\[\d\] is (\d), wanted (\d)"),
    "combine does not wait": (Protocol(waits_for_columns=False), r"slots0\[\d\]\[\d\] is (\d), wanted (\d)"),
    "epoch counted before all CTAs have read it": (Protocol(epoch_by_last=False), r"epoch\[\d\] is (\d), wanted (\d)"),
}


@pytest.mark.parametrize("protocol", SOUND.values(), ids=SOUND)
def test_two_ranks_with_delayed_stores(protocol):
    outcome = explore(protocol, num_ranks=2, num_launches=3, delayed_stores=True)
    assert outcome.error is None, outcome.trace
    assert outcome.num_states > 10_000
    # The shorter exploration comes to the same verdict where both can be afforded.
    assert explore(protocol, num_ranks=2, num_launches=3, delayed_stores=False).error is None


def test_four_launches():
    outcome = explore(Protocol(), num_ranks=2, num_launches=4, delayed_stores=True)
    assert outcome.error is None, outcome.trace


@pytest.mark.parametrize("protocol", SOUND.values(), ids=SOUND)
def test_three_ranks(protocol):
    outcome = explore(replace(protocol, reads_epoch=False), num_ranks=3, num_launches=4, delayed_stores=False)
    assert outcome.error is None, outcome.trace


@pytest.mark.parametrize(("protocol", "error"), BROKEN.values(), ids=BROKEN)
def test_broken_variants_are_found(protocol, error):
    outcome = explore(protocol, num_ranks=2, num_launches=3, delayed_stores=True)
    assert outcome.error is not None and re.search(error, outcome.error), outcome


def test_one_inbox_is_overwritten_by_the_next_launch():
    outcome = explore(Protocol(inbox_buffers=1), num_ranks=2, num_launches=3, delayed_stores=False)
    found, wanted = re.findall(r"is (\d), wanted (\d)", str(outcome.error))[0]
    assert int(found) == int(wanted) + 1
    # By a rank that has left the launch, in which a late CTA of the other still is.
    assert "thread 2: inbox0" in str(outcome.error)


def test_one_inbox_fails_at_three_ranks_too():
    protocol = Protocol(inbox_buffers=1, reads_epoch=False)
    assert explore(protocol, num_ranks=3, num_launches=3, delayed_stores=False).error is not None


@pytest.mark.parametrize("delayed", [True, False])
def test_ranks_without_tokens(delayed):
    """Taking part with nothing to send is what keeps a rank from overtaking."""
    sound, broken = Protocol(reads_epoch=False), Protocol(reads_epoch=False, empty_takes_part=False)
    arguments: dict[str, Any] = {"num_ranks": 2, "num_launches": 4, "delayed_stores": delayed, "sends": SPARSE}
    assert explore(sound, **arguments).error is None
    error = explore(broken, **arguments).error
    assert error is not None and "inbox1[1][0] is 3, wanted 1" in error


def test_a_rank_that_stops_leaves_the_others_waiting():
    """Nothing in the protocol notices: hence the time limit of every wait."""
    outcome = explore(Protocol(), num_ranks=2, num_launches=3, delayed_stores=False, stops=(1, 2))
    assert outcome.error == "nobody can go on"
