"""Values that are no good, generated as in tests/test_bad_values.py, in the kernel: each orientation on a Hopper GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bad_values import Layer
from tests.support.hostile import cases
from tests.support.skips import gpu_tests, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())

# A token's tolerance: the kernel's sums have an order of their own, and some FP8 values move across a rounding boundary.
TOLERANCE = 1e-3
LAYERS = {
    "swapAB": Layer(6, 3, 4, 256, 128, TOLERANCE),
    # MXFP4: two thread blocks on each SM, from 330 units of 64 columns on.
    "halves": Layer(16, 3, 8, 256, 2688, TOLERANCE),
    # MXFP4: the wide orientation.
    "normal": Layer(150, 3, 4, 256, 256, TOLERANCE),
    "clusters": Layer(400, 3, 4, 256, 256, TOLERANCE),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@cases(40)
@given(data=st.data())
def test_values_of_tokens(layer, data):
    layer.check_tokens(data)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@cases(30)
@given(data=st.data())
def test_values_of_weights(layer, data):
    layer.check_weights(data)
