"""A cluster of two thread blocks neither overwrites what the other one still needs nor waits for ever, in any order of events."""

import pytest

from tests.protocol.cluster_ring import Ring, Unit, explore

WEIGHTS, TOKENS = Unit(2, shares_weights=True), Unit(2, shares_tokens=True)
SHORT_WEIGHTS, SHORT_TOKENS, ALONE = Unit(1, shares_weights=True), Unit(1, shares_tokens=True), Unit(1)
PLANS = {
    "weights": [WEIGHTS, WEIGHTS],
    "tokens": [TOKENS, TOKENS],
    "mixed": [SHORT_WEIGHTS, TOKENS, ALONE, SHORT_WEIGHTS],
    "short": [SHORT_TOKENS, SHORT_WEIGHTS, ALONE, SHORT_TOKENS],
    "none": [],
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("stages", "in_flight"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_no_order_goes_wrong(stages, in_flight, plan):
    outcome = explore(Ring(stages, in_flight, ticket_slots=stages + 2), (plan, plan))
    assert outcome.error is None, outcome.trace


@pytest.mark.parametrize(
    ("ring", "unit", "error"),
    [
        (Ring(releases_to_both=False), SHORT_WEIGHTS, "weights overwrite a stage"),
        (Ring(releases_to_both=False), SHORT_TOKENS, "tokens overwrite a stage"),
        (Ring(stages=2, ticket_slots=3), ALONE, "a ticket overwrites another"),
        (Ring(waits_at_the_end=False), ALONE, "release arrives at a block that has ended"),
    ],
)
def test_each_rule_is_needed(ring, unit, error):
    plan = [unit] * 5
    assert explore(ring, (plan, plan)).error == error


def test_blocks_with_different_plans_wait_for_ever():
    """Hence they agree on missing ids before they begin."""
    assert explore(Ring(), ([WEIGHTS], [Unit(2)])).error == "nobody can go on"
