"""The demo's decode loop on the GPUs of a host: `python -m pytest -m gpu tests/gpu/test_demo.py`."""

import jax
import pytest

from jax_megamoe.primitives import _library
from tests.support.cases import all_ranks
from tests.support.demo import assert_mesh_decodes_as_one_device
from tests.support.skips import gpu_tests, gpus, why_no_gpus, why_no_group

pytestmark = gpu_tests(why_no_group())


@all_ranks
@pytest.mark.parametrize("num_prompts", [3, 16])
def test_text_on_a_mesh_is_that_of_one_gpu(num_ranks: int, num_prompts: int) -> None:
    if reason := why_no_gpus(num_ranks):
        pytest.skip(reason)
    # In TF32, attention would differ by more than the order of its sums.
    with jax.default_matmul_precision("highest"):
        compiled = assert_mesh_decodes_as_one_device(num_ranks, num_prompts, gpus())
    assert _library.MOE_PEERS_TARGET in compiled
