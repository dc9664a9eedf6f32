"""The fused kernel with other activations than SwiGLU's default, against the reference, on a Hopper GPU."""

import functools
from typing import Any, get_args

import jax
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.weight_layout import Format
from tests.support.compare import difference
from tests.support.problems import Sizes, make_problem
from tests.support.skips import gpu_tests, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())

ODD = Sizes(hidden=640, inter=384, num_experts=8, top_k=4)
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "gpt-oss": {"activation": mm.SwiGLU(alpha=1.702, up_offset=1.0), "activation_clamp": 7.0},
    "situ": {"activation": mm.SiTU(4.0, 25.0)},
    "narrow": {"activation": mm.SiTU(0.25, 0.5)},
}


@pytest.mark.parametrize("options", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("weight_format", get_args(Format))
@pytest.mark.parametrize("tokens", [1, 40, 700, 1500])
def test_is_the_references(tokens, weight_format, options):
    problem = make_problem(tokens, ODD, "masked", weight_format=weight_format)
    y = jax.jit(functools.partial(mm.moe, **options))(*problem)
    wanted = jax.jit(functools.partial(mm.reference.moe, **options))(*problem)
    assert np.isfinite(np.asarray(y, np.float32)).all()
    assert difference(y, wanted) < 1e-4
