"""The order of the units, compiled for the host: against the formula in one piece, and every unit exactly once."""

from bisect import bisect_right
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.native_program import compile_program

NO_CHUNK = 2**24 - 1  # beyond all chunks, as lay_out_chunks leaves it where no expert has a single one


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(tmp_path_factory.mktemp("native"), "unit_order_test")


@st.composite
def plans(draw):
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any))
    bases = [0, *accumulate(counts)]
    swaps, down = draw(st.booleans()), draw(st.booleans())
    single = [base for base, count in zip(bases, counts, strict=False) if count == 1]
    smallest = draw(st.sampled_from([*single, NO_CHUNK]))
    first_tail = draw(st.sampled_from(bases))  # the last of them: no tail
    run = draw(st.sampled_from([0, 1, 2, 3])) if not swaps and not down else 0
    return swaps, down, draw(st.integers(1, 7)), first_tail, smallest, run, counts


def expected(swaps, down, tickets, first_tail, smallest, run, counts):
    """The formula as it was, in one piece; but for runs, which are easier to say as loops."""
    if run:
        for expert, count in enumerate(counts):
            for first in range(0, count, run):
                chunks = range(first, min(first + run, count))
                yield from ((expert, group, chunk) for group in range(tickets) for chunk in chunks)
        return
    bases = [0, *accumulate(counts)]
    num_chunks = bases[-1]

    def expert_of_chunk(chunk):
        return bisect_right(bases, chunk, hi=len(counts)) - 1

    for ticket in range(num_chunks * tickets):
        index = ticket
        chunk = index // tickets
        if swaps and down:
            place = chunk
            if place >= smallest:
                chunk = smallest if place == num_chunks - 1 else place + 1
            index += (chunk - place) * tickets
        tail = not swaps and down and chunk >= first_tail
        expert = expert_of_chunk(chunk)
        first = first_tail if tail else bases[expert]
        chunks = (num_chunks if tail else bases[expert + 1]) - first
        within = index - first * tickets
        group = within // chunks
        member = within - group * chunks
        if tail:
            expert = expert_of_chunk(first + member)
            member += first - bases[expert]
        yield expert, group, member


@settings(deadline=None, max_examples=100)
@given(several=st.lists(plans(), min_size=1, max_size=10))
def test_order(program, several):
    text = "\n".join(
        f"{swaps:d} {down:d} {tickets} {first_tail} {smallest} {run} {len(counts)} {' '.join(map(str, counts))}"
        for swaps, down, tickets, first_tail, smallest, run, counts in several
    )
    for plan, line in zip(several, program(text).strip().split("\n"), strict=True):
        values = list(map(int, line.split()))
        places = list(zip(values[0::3], values[1::3], values[2::3], strict=True))
        assert places == list(expected(*plan))
        swaps, down, tickets, _, smallest, _, counts = plan
        units = [
            (e, tile, chunk) for e, count in enumerate(counts) for tile in range(tickets) for chunk in range(count)
        ]
        assert sorted(places) == units, "every unit is there once"
        if swaps and down and smallest != NO_CHUNK:
            last = bisect_right([0, *accumulate(counts)], smallest, hi=len(counts)) - 1
            assert {expert for expert, *_ in places[-tickets:]} == {last}, "the smallest chunk comes last"
