"""The order of units whose images go through rings, compiled for the host: none waits for one with a higher ticket."""

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.native_program import compile_program


class Plan(NamedTuple):
    """How many chunks gate/up units are ahead, those of a turn and of runs, tickets of a chunk, chunks of experts."""

    ahead: int
    turn: int
    runs: tuple[int, int]  # of gate/up and of down units
    tickets: tuple[int, int]  # likewise
    counts: list[int]

    def line(self):
        numbers = (self.ahead, self.turn, *self.runs, *self.tickets, len(self.counts), *self.counts)
        return " ".join(map(str, numbers))


def least_ahead(turn, runs):
    return turn + runs[1] - 1


def least_beyond(runs):
    """What the ring of activations has beyond the chunks that gate/up units are ahead, at least."""
    return sum(runs) - 2


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(tmp_path_factory.mktemp("native"), "unit_turns_test")


@st.composite
def plans(draw):
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any))
    turn, gate_up_run = draw(st.integers(1, 20)), draw(st.integers(1, 8))
    runs = (gate_up_run, gate_up_run * draw(st.integers(1, 3)))
    ahead = least_ahead(turn, runs) + draw(st.integers(0, 5))
    return Plan(ahead, turn, runs, draw(st.tuples(st.integers(1, 5), st.integers(1, 5))), counts)


def order(program, several):
    """For each plan its tickets: (projection, chunk, group)."""
    for line in program("\n".join(plan.line() for plan in several)).strip().split("\n"):
        values = list(map(int, line.split()))
        yield list(zip(values[0::3], values[1::3], values[2::3], strict=True))


class Order:
    """The first and the last ticket of each chunk in both projections."""

    def __init__(self, plan, tickets):
        self.num_chunks = sum(plan.counts)
        found: list[list[list[int]]] = [[[] for _ in range(self.num_chunks)] for _ in range(2)]
        for number, (projection, chunk, _) in enumerate(tickets):
            found[projection][chunk].append(number)
        self.first_gate_up, self.first_down = ([min(numbers) for numbers in of_chunks] for of_chunks in found)
        self.last_gate_up, self.last_down = ([max(numbers) for numbers in of_chunks] for of_chunks in found)

    def has_activations(self):
        """Before they are needed."""
        return all(last < first for last, first in zip(self.last_gate_up, self.first_down, strict=True))

    def has_places_of_activations(self, slots):
        chunks = range(slots, self.num_chunks)
        return all(self.last_down[chunk - slots] < self.first_gate_up[chunk] for chunk in chunks)

    def has_places_of_tokens(self, slots):
        chunks = range(slots, self.num_chunks)
        return all(self.last_gate_up[chunk - slots] < self.first_gate_up[chunk] for chunk in chunks)


@settings(deadline=None, max_examples=60)
@given(several=st.lists(plans(), min_size=1, max_size=6))
def test_every_ticket_waits_for_lower_ones(program, several):
    for plan, tickets in zip(several, order(program, several), strict=True):
        found = Order(plan, tickets)
        each = [(projection, plan.tickets[projection]) for projection in range(2)]
        units = [
            (p, chunk, group) for p, groups in each for chunk in range(found.num_chunks) for group in range(groups)
        ]
        assert sorted(tickets) == units, "every unit is there once"
        assert found.has_activations()
        assert found.has_places_of_activations(plan.ahead + least_beyond(plan.runs))
        slots = 2 * plan.runs[0] - 1
        assert found.has_places_of_tokens(slots)
        # Tickets that wait for no other (UnitSchedule::independent_end), with a ring of as many images or more.
        for places in {slots, min(slots + 3, plan.ahead)}:
            chunks = places - plan.runs[0] if found.num_chunks > places else found.num_chunks
            independent = tickets[: min(chunks, plan.ahead) * plan.tickets[0]]
            assert all(projection == 0 and chunk < places for projection, chunk, _ in independent)


def test_one_turn_is_all_gate_up_units_before_all_down_units(program):
    """As many chunks as gate/up units are ahead: the order of a call without rings, which is the fastest."""
    plan = Plan(30, 20, (4, 6), (3, 2), [5, 0, 12, 13])
    (tickets,) = order(program, [plan])
    assert [projection for projection, *_ in tickets] == [0] * 90 + [1] * 60


def test_down_units_follow_their_gate_up_units(program):
    """With many chunks, activations are read soon after they are written: that is what the ring is short for."""
    plan = Plan(20, 8, (4, 6), (3, 2), [30, 5, 0, 40])
    (tickets,) = order(program, [plan])
    found = Order(plan, tickets)
    begun = [sum(first < number for first in found.first_gate_up) for number in found.first_down]
    assert all(chunks <= chunk + plan.ahead + least_beyond(plan.runs) for chunk, chunks in enumerate(begun))
    assert begun[0] < found.num_chunks / 2


@pytest.mark.parametrize(("less_ahead", "less_beyond"), [(1, 0), (0, 1)])
def test_nothing_less_is_enough(program, less_ahead, less_beyond):
    """The two limits are sharp: with less there is a plan in which a ticket waits for a higher one."""
    turn, runs, lone = 8, (8, 8), [1]
    ahead, beyond = least_ahead(turn, runs) - less_ahead, least_beyond(runs) - less_beyond
    several = [
        Plan(ahead, turn, runs, (16, 16), lone * before + [8] * 2 + lone * between + [8] * 6)
        for before in range(8)
        for between in range(8)
    ]
    found = [Order(plan, tickets) for plan, tickets in zip(several, order(program, several), strict=True)]
    assert not all(one.has_activations() and one.has_places_of_activations(ahead + beyond) for one in found)


@pytest.fixture(scope="module")
def ring_sizes(tmp_path_factory):
    return compile_program(tmp_path_factory.mktemp("native"), "ring_sizes_test")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 20_000),  # tokens
            st.integers(1, 8),  # of k experts
            st.integers(1, 32).map(lambda blocks: 128 * blocks),
            st.sampled_from([1, 4, 32, 48]),  # experts of a rank
            st.integers(2, 8),  # ranks
        ),
        min_size=1,
        max_size=20,
    )
)
def test_rings_are_as_long_as_the_order_needs(ring_sizes, calls):
    """Of 128 intermediate columns there is one gate/up unit for a chunk, and the CTAs work on the most chunks."""
    calls.append((20_000, 4, 128, 4, 2))
    lines = ring_sizes("\n".join(" ".join(map(str, call)) for call in calls)).split("\n")
    for (tokens, top_k, _, experts, _), line in zip(calls, lines, strict=False):
        assembles, ahead, images, activations, most_chunks, turn, *runs = map(int, line.split())
        assert assembles == (tokens * top_k >= 256 * experts)
        assert ahead >= least_ahead(turn, runs)
        assert images >= min(most_chunks, 2 * runs[0] - 1)
        assert images <= ahead, "UnitSchedule::independent_end would have down units"
        assert activations >= min(most_chunks, ahead + least_beyond(runs))
