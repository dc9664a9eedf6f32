"""The order of units whose images go through rings, compiled for the host: none waits for one with a higher ticket."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.native_program import compile_program

RUN_CHUNKS = 8
LEAST_AHEAD = 2 * RUN_CHUNKS - 1
# What the ring of activations has beyond the chunks that gate/up units are ahead, at least.
LEAST_BEYOND = 2 * RUN_CHUNKS - 2


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(tmp_path_factory.mktemp("native"), "unit_turns_test")


@st.composite
def plans(draw):
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any))
    return draw(st.integers(LEAST_AHEAD, 40)), draw(st.integers(1, 5)), draw(st.integers(1, 5)), counts


def order(program, several):
    """For each plan its tickets: (projection, chunk, group)."""
    text = "\n".join(
        f"{ahead} {gate_up} {down} {len(counts)} {' '.join(map(str, counts))}"
        for ahead, gate_up, down, counts in several
    )
    for line in program(text).strip().split("\n"):
        values = list(map(int, line.split()))
        yield list(zip(values[0::3], values[1::3], values[2::3], strict=True))


def by_chunk(tickets, projection, num_chunks, choose):
    """The first or last ticket of each chunk in a projection."""
    found = [[] for _ in range(num_chunks)]
    for number, (down, chunk, _) in enumerate(tickets):
        if down == projection:
            found[chunk].append(number)
    return [choose(numbers) for numbers in found]


@settings(deadline=None, max_examples=60)
@given(several=st.lists(plans(), min_size=1, max_size=6))
def test_every_ticket_waits_for_lower_ones(program, several):
    for (ahead, gate_up, down, counts), tickets in zip(several, order(program, several), strict=True):
        num_chunks = sum(counts)
        each = [(0, gate_up), (1, down)]
        units = [(p, chunk, group) for p, groups in each for chunk in range(num_chunks) for group in range(groups)]
        assert sorted(tickets) == units, "every unit is there once"
        first_gate_up, last_gate_up = (by_chunk(tickets, 0, num_chunks, choose) for choose in (min, max))
        first_down, last_down = (by_chunk(tickets, 1, num_chunks, choose) for choose in (min, max))
        for chunk in range(num_chunks):
            assert last_gate_up[chunk] < first_down[chunk], "a chunk's activations"
            if chunk >= ahead:
                assert last_gate_up[chunk - ahead] < first_gate_up[chunk], "the place of an image of tokens"
            if chunk >= ahead + LEAST_BEYOND:
                assert last_down[chunk - ahead - LEAST_BEYOND] < first_gate_up[chunk], "the place of activations"
        independent = (ahead - RUN_CHUNKS if num_chunks > ahead else num_chunks) * gate_up
        assert all(projection == 0 and chunk < ahead for projection, chunk, _ in tickets[:independent])


def test_down_units_follow_their_gate_up_units(program):
    """With many chunks, activations are read soon after they are written: that is what the ring is short for."""
    ahead, gate_up, down, counts = 20, 3, 2, [30, 5, 0, 40]
    (tickets,) = order(program, [(ahead, gate_up, down, counts)])
    num_chunks = sum(counts)
    first_down = by_chunk(tickets, 1, num_chunks, min)
    begun = [sum(first < number for first in by_chunk(tickets, 0, num_chunks, min)) for number in first_down]
    assert all(chunks <= chunk + ahead + LEAST_BEYOND for chunk, chunks in enumerate(begun))
    assert begun[0] < num_chunks / 2


@pytest.mark.parametrize(("ahead", "beyond"), [(LEAST_AHEAD - 1, LEAST_BEYOND), (LEAST_AHEAD, LEAST_BEYOND - 1)])
def test_nothing_less_is_enough(program, ahead, beyond):
    """The two limits are sharp: with less there is a plan in which a ticket waits for a higher one."""
    lone, run = [1], [RUN_CHUNKS]
    plans = [
        (ahead, 16, 16, lone * before + run * 2 + lone * between + run * 6)
        for before in range(RUN_CHUNKS)
        for between in range(RUN_CHUNKS)
    ]
    broken = False
    for (_, _, _, counts), tickets in zip(plans, order(program, plans), strict=True):
        num_chunks = sum(counts)
        first_gate_up, last_gate_up = (by_chunk(tickets, 0, num_chunks, choose) for choose in (min, max))
        first_down, last_down = (by_chunk(tickets, 1, num_chunks, choose) for choose in (min, max))
        broken |= any(last_gate_up[c] > first_down[c] for c in range(num_chunks))
        broken |= any(last_down[c - ahead - beyond] > first_gate_up[c] for c in range(ahead + beyond, num_chunks))
    assert broken
