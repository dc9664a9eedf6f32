"""Generated values that are no good: results are those of the NumPy model, and nothing crosses between tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bad_values import FORMATS, Layer, program
from tests.support.hostile import cases

# A token's tolerance: FP8 values that the order of sums moves across a rounding boundary.
LAYER = Layer(tokens=6, top_k=3, experts=4, hidden=256, inter=128, tolerance=1e-6)


@cases(60)
@given(data=st.data())
def test_values_of_tokens(data):
    LAYER.check_tokens(data)


@cases(40)
@given(data=st.data())
def test_values_of_weights(data):
    LAYER.check_weights(data)


@pytest.mark.parametrize("format", FORMATS)
def test_one_program_serves_all_values(format):
    """What the tests above rely on, to be fast."""
    weights, compiled, sizes = LAYER.packed(format), program(format), []
    for seed in range(3):
        x, ids, topk_weights = LAYER.clean(seed)
        compiled(x, weights, ids, topk_weights)
        sizes.append(compiled._cache_size())
    assert len(set(sizes)) == 1
