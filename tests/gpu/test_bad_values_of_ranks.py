"""Values that are no good, generated as in tests/test_bad_values.py, where two GPUs share the experts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gpu.test_bad_values import TOLERANCE
from tests.support.bad_values import LayerOfRanks
from tests.support.hostile import cases
from tests.support.meshes import gpu_mesh
from tests.support.skips import gpu_tests, why_no_group

pytestmark = gpu_tests(why_no_group())

# Tokens of both ranks, in the orientations of tests/gpu/test_bad_values.py; rows are sent, or images put together.
SIZES = {
    "swapAB": (6, 3, 4, 256, 128),
    "halves": (16, 3, 8, 256, 2688),
    "normal": (150, 3, 4, 256, 256),
    "assembled": (800, 3, 4, 256, 256),
}


def layer_of(sizes: tuple[int, int, int, int, int]) -> LayerOfRanks:
    return LayerOfRanks(*sizes, TOLERANCE, gpu_mesh(expert=2))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@cases(15)
@given(data=st.data())
def test_values_of_tokens(sizes, data):
    layer_of(sizes).check_tokens(data)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@cases(10)
@given(data=st.data())
def test_values_of_weights(sizes, data):
    layer_of(sizes).check_weights(data)
