"""Thread blocks that decode weights for each other neither overwrite what is still needed nor wait for ever, in any order."""

import pytest

from tests.protocol.cluster_ring import Unit
from tests.protocol.decoder_rings import Rings, explore

WEIGHTS, TOKENS, ALONE = Unit(2, shares_weights=True), Unit(2, shares_tokens=True), Unit(1)
SHORT_WEIGHTS, SHORT_TOKENS = Unit(1, shares_weights=True), Unit(1, shares_tokens=True)
PLANS = {
    "weights": [WEIGHTS, WEIGHTS],
    "tokens": [TOKENS, TOKENS],
    "mixed": [SHORT_WEIGHTS, TOKENS, ALONE],
    "short": [SHORT_TOKENS, SHORT_WEIGHTS, ALONE, SHORT_WEIGHTS],
    "none": [],
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("rings", [Rings(1, 1, 1), Rings(2, 1, 1), Rings(1, 2, 1), Rings(2, 2, 2)], ids=str)
def test_no_order_goes_wrong(rings, plan):
    outcome = explore(rings, plan)
    assert outcome.error is None, outcome.trace


@pytest.mark.parametrize(
    ("rings", "unit", "error"),
    [
        (Rings(stages=1, releases_to_both=False), SHORT_TOKENS, "tokens overwrite a stage"),
        (Rings(stages=1, releases_to_both=False), SHORT_WEIGHTS, "what a copy reads is overwritten"),
        (Rings(waits_at_the_end=False), ALONE, "a release arrives at a block that has ended"),
        (Rings(waits_at_the_end=False), SHORT_WEIGHTS, "what a copy reads is overwritten"),
    ],
)
def test_each_rule_is_needed(rings, unit, error):
    assert explore(rings, [unit] * 3).error == error
