"""The edges that docstrings promise, in the kernel: those of tests/test_edges.py that are values, on a Hopper GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from tests.support.compare import difference
from tests.support.problems import Sizes, make_inputs, make_weights
from tests.support.skips import gpu_tests, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())

SIZES = Sizes(hidden=512, inter=384, num_experts=8, top_k=4)
E, K = SIZES.num_experts, SIZES.top_k


@pytest.mark.parametrize(
    ("number", "dtype", "clamped"),
    [(-1, np.int32, 0), (3, np.int32, 2), (-(2**31), np.int32, 0), (2**32 + 1, np.int64, 2), (255, np.uint8, 2)],
)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_layers_of_arrays_are_clamped(tokens, number, dtype, clamped):
    x, ids, topk_weights = make_inputs(tokens, SIZES, "masked")
    layers = [make_weights(SIZES, seed) for seed in range(3)]
    stacked = mm.stack_experts(layers)
    with jax.enable_x64(True):
        y = jax.jit(lambda layer: mm.moe(x, stacked, ids, topk_weights, layer=layer))(jnp.asarray(number, dtype))
    np.testing.assert_array_equal(y, jax.jit(mm.moe)(x, layers[clamped], ids, topk_weights))


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_ids_at_the_ends_of_int32(tokens):
    x, _, topk_weights = make_inputs(tokens, SIZES)
    ends = [-1, E, -(2**31), 2**31 - 1, E - 1, 0, -E]
    ids = np.random.default_rng(0).choice(ends, (tokens, K)).astype(np.int32)
    topk_weights = jnp.where((ids < 0) | (ids >= E), jnp.nan, topk_weights)
    y, load = mm.moe(x, make_weights(SIZES), jnp.asarray(ids), topk_weights, return_expert_load=True)
    wanted, wanted_load = mm.reference.moe(
        x, make_weights(SIZES), jnp.asarray(ids), topk_weights, return_expert_load=True
    )
    np.testing.assert_array_equal(load, wanted_load)
    assert difference(y, wanted) < 1e-4
    unused = ((ids < 0) | (ids >= E)).all(1)
    assert not np.asarray(y)[unused].view(np.uint16).any()


@pytest.mark.parametrize("clamp", [1e-3, 0.25, 1e300])
def test_clamps(clamp):
    x, ids, topk_weights = make_inputs(40, SIZES)
    y = mm.moe(x, make_weights(SIZES), ids, topk_weights, activation_clamp=clamp)
    assert difference(y, mm.reference.moe(x, make_weights(SIZES), ids, topk_weights, activation_clamp=clamp)) < 1e-4


@pytest.mark.parametrize("guard", ["transfers", "64 bits", "dtype promotion", "rank promotion"])
def test_guards(guard):
    x, ids, topk_weights = make_inputs(40, SIZES, "masked")
    weights, logits = make_weights(SIZES), jax.random.normal(jax.random.key(0), (40, 16))
    contexts = {
        "transfers": lambda: jax.transfer_guard("disallow"),
        "64 bits": lambda: jax.enable_x64(True),
        "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
        "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    }
    wanted = mm.moe(x, weights, ids, topk_weights), *mm.route(logits, 3, num_groups=4, top_groups=2)
    with contexts[guard]():
        results = mm.moe(x, weights, ids, topk_weights), *mm.route(logits, 3, num_groups=4, top_groups=2)
    for result, value in zip(results, wanted, strict=True):
        assert result.dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(result), np.asarray(value))


def test_small_scores():
    """Down to the smallest numbers also where the backend keeps them."""
    logits = np.linspace(-206, 30, 4000, dtype=np.float32)
    wanted = np.sqrt(np.log1p(np.exp(logits.astype(np.float64))))
    scores = np.asarray(mm.route(logits[:, None], 1, scoring="sqrtsoftplus", renormalize=False)[1])[:, 0]
    np.testing.assert_allclose(scores.astype(np.float64), wanted, rtol=5e-6, atol=2.0**-149)
