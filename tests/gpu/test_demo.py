"""The demo's decode loop on the GPUs of a host: `python -m pytest -m gpu tests/gpu/test_demo.py`."""

import jax
import pytest

from tests.gpu.test_expert_parallel import all_ranks, gpus, needs_gpus
from tests.test_demo import check_mesh

pytestmark = needs_gpus


@all_ranks
@pytest.mark.parametrize("num_prompts", [3, 16])
def test_text_on_a_mesh_is_that_of_one_gpu(num_ranks: int, num_prompts: int) -> None:
    if num_ranks > len(gpus()):
        pytest.skip(f"needs {num_ranks} GPUs; this process sees {len(gpus())}")
    # In TF32, attention would differ by more than the order of its sums.
    with jax.default_matmul_precision("highest"):
        compiled = check_mesh(num_ranks, num_prompts, gpus())
    assert "jax_megamoe.moe_peers.v2" in compiled
