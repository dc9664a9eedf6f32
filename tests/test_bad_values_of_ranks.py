"""Generated values that are no good, where ranks share the experts: as with one device, and nothing crosses between tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bad_values import LayerOfRanks
from tests.support.hostile import cases
from tests.support.meshes import AUTO, MESHES, make_mesh
from tests.support.skips import unless, why_no_host_devices

pytestmark = unless(why_no_host_devices())


def layer_on(mesh: str) -> LayerOfRanks:
    return LayerOfRanks(16, 3, 8, 256, 128, 1e-6, make_mesh(MESHES[mesh], AUTO))


@pytest.mark.parametrize("mesh", ["expert", "data x expert"])
@cases(20)
@given(data=st.data())
def test_values_of_tokens(mesh, data):
    layer_on(mesh).check_tokens(data)


@cases(15)
@given(data=st.data())
def test_values_of_weights(data):
    layer_on("expert").check_weights(data)
