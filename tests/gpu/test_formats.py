"""The fused kernel with weights of every format, against the reference, on a Hopper GPU."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.weight_layout import Format
from tests.support.cases import MODELS, ODD_ROUTINGS, OTHER_FORMATS, SHARED
from tests.support.compare import bits, difference
from tests.support.layer_with_options import moe, reference
from tests.support.problems import Problem, Sizes, make_inputs, make_problem, make_weights
from tests.support.skips import gpu_tests, why_no_hopper, why_no_testing
from tests.support.virtual_ranks import on_virtual_ranks, one_rank

pytestmark = gpu_tests(why_no_hopper())

ODD = Sizes(hidden=640, inter=384, num_experts=8, top_k=4)


def assert_is_the_references(problem: Problem) -> None:
    y, load = moe(*problem)
    wanted, wanted_load = reference(*problem)
    assert np.isfinite(np.asarray(y, np.float32)).all()
    np.testing.assert_array_equal(load, wanted_load)
    # Of few activations, one alone on the other side of a rounding boundary of E4M3, 6 % of it, is more than 1e-4.
    num_activations = int(np.sum(load)) * problem.weights.intermediate_size
    assert difference(y, wanted) < (1e-4 if num_activations > 4096 else 5e-4)


@pytest.mark.parametrize("weight_format", OTHER_FORMATS)
@pytest.mark.parametrize("tokens", [1, 8, 9, 33, 64, 100, 129, 300, 1000, 3000])
def test_token_counts(tokens, weight_format):
    assert_is_the_references(make_problem(tokens, ODD, weight_format=weight_format))


@pytest.mark.parametrize("weight_format", OTHER_FORMATS)
@pytest.mark.parametrize("tokens", [1, 100, 400])
@pytest.mark.parametrize(("hidden", "inter"), MODELS.values(), ids=MODELS)
def test_shapes(hidden, inter, tokens, weight_format):
    assert_is_the_references(make_problem(tokens, Sizes(hidden, inter, 8, 6), weight_format=weight_format))


@pytest.mark.parametrize("weight_format", get_args(Format))
@pytest.mark.parametrize("tokens", [1, 40, 400])
@pytest.mark.parametrize(("hidden", "inter"), [(2880, 2880), (544, 352)], ids=str)
def test_odd_sizes(hidden, inter, tokens, weight_format):
    problem = make_problem(tokens, Sizes(hidden, inter, 8, 4), weight_format=weight_format)
    assert problem.weights.gate_up.shape[1:3] == (-(-inter // 128) * 2, -(-hidden // 128))
    assert_is_the_references(problem)


@pytest.mark.parametrize("weight_format", OTHER_FORMATS)
def test_a_bias_is_added_to_the_last_bit(weight_format):
    """Of weights that are zeros: activations of the biases alone, and down's times the routing weight."""
    hidden, inter, tokens = 256, 128, 70
    x = jnp.ones((tokens, hidden), jnp.bfloat16)
    zeros = np.zeros((2, inter, hidden), np.float32)
    gate_up_bias = np.concatenate([np.full((2, inter), 20.0), np.ones((2, inter))], 1)
    down = np.zeros((2, hidden, inter), np.float32)
    down[:, :, 5] = 0.5  # times an activation of 20, times the routing weight
    down_bias = np.arange(2 * hidden, dtype=np.float32).reshape(2, hidden) / 4
    weights = mm.quantize_experts(
        zeros, zeros, down, gate_up_bias=gate_up_bias, down_bias=down_bias, format=weight_format
    )
    for count in (1, 9, tokens):
        ids = jnp.asarray(np.arange(count)[:, None] % 2, jnp.int32)
        y = np.asarray(mm.moe(x[:count], weights, ids, jnp.full((count, 1), 0.25)), np.float32)
        wanted = (0.25 * (10 + down_bias))[np.asarray(ids)[:, 0]]
        np.testing.assert_array_equal(y, wanted.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize("weight_format", OTHER_FORMATS)
@pytest.mark.parametrize("routing", ODD_ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 40, 300, 700])
def test_routings(routing, tokens, weight_format):
    assert_is_the_references(make_problem(tokens, ODD, routing, weight_format=weight_format))


@pytest.mark.parametrize("weight_format", OTHER_FORMATS)
@pytest.mark.parametrize("tokens", [5, 200])
def test_layers_are_stacked(tokens, weight_format):
    x, _, ids, topk_weights = make_problem(tokens, ODD)
    layers = [make_weights(ODD, seed, weight_format) for seed in range(3)]
    stacked = mm.stack_experts(layers)
    for layer, weights in enumerate(layers):
        y, _ = moe(x, stacked, ids, topk_weights, layer=jnp.int32(layer))
        np.testing.assert_array_equal(bits(y), bits(moe(x, weights, ids, topk_weights)[0]))


@pytest.mark.skipif(why_no_testing() is not None, reason=str(why_no_testing()))
@pytest.mark.parametrize("weight_format", OTHER_FORMATS)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 16, 150, 800])
def test_ranks_have_the_bits_of_one(tokens, num_ranks, weight_format):
    problem = make_problem(tokens * num_ranks, SHARED, "masked", weight_format=weight_format)
    wanted, wanted_load = one_rank(*problem)
    y, load = on_virtual_ranks(*problem, num_ranks=num_ranks)
    np.testing.assert_array_equal(load, wanted_load)
    np.testing.assert_array_equal(bits(y), bits(wanted))


def mxfp4_layer(low: int, high: int) -> mm.ExpertWeights:
    """Random codes and exponents; a row has all of low to high, and each exponent meets all codes."""
    rng = np.random.default_rng(low)

    def matrix(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        codes = rng.integers(0, 256, (SHARED.num_experts, rows, columns // 2), np.uint8)
        return codes, rng.integers(low, high + 1, (SHARED.num_experts, rows, columns // 32)).astype(np.uint8)

    return mm.pack_experts(*matrix(2 * SHARED.inter, SHARED.hidden), *matrix(SHARED.hidden, SHARED.inter))


@pytest.mark.parametrize("tokens", [3, 60, 200])
@pytest.mark.parametrize("low", [100, 104, 112])
def test_exponents_spread_as_far_as_they_may(low, tokens):
    x, ids, topk_weights = make_inputs(tokens, SHARED)
    assert_is_the_references(Problem(x, mxfp4_layer(low, low + 14), ids, topk_weights))
    assert_is_the_references(Problem(x, mxfp4_layer(low, low + 26), ids, topk_weights))


@pytest.mark.parametrize("exponent", [*range(0, 255, 15), 1, 26, 27, 126, 127, 128])
def test_every_code_is_the_number_it_stands_for(exponent):
    """One token that is one in a column of its own for each of the sixteen codes; gate 20, so that SiLU passes it on."""
    hidden, inter = 128, 128
    codes = np.zeros((1, 2 * inter, hidden), np.uint8)
    exponents = np.full((1, 2 * inter, hidden // 32), 127, np.uint8)
    codes[0, :inter, 0], exponents[0, :inter, 0] = 5, 130  # gate: 3 * 2^3 for a token of 1
    codes[0, inter:, 0] = 2  # up: 1
    down = np.zeros((1, hidden, inter), np.uint8)
    down[0, :16, 7] = np.arange(16)
    down_exponents = np.full((1, hidden, inter // 32), exponent, np.uint8)

    def joined(nibbles: np.ndarray) -> np.ndarray:
        return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).astype(np.uint8)

    weights = mm.pack_experts(joined(codes), exponents, joined(down), down_exponents)
    x = jnp.zeros((1, hidden), jnp.bfloat16).at[0, 0].set(1.0)
    y = mm.moe(x, weights, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.float32))
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    with np.errstate(over="ignore"):
        wanted = np.float32(24 * np.concatenate([magnitudes, -magnitudes]) * 2.0 ** (exponent - 127))
    found = np.asarray(y, np.float32)[0, :16]
    usual = (np.abs(wanted) < 3e38) & ((np.abs(wanted) > 1e-37) | (wanted == 0))
    np.testing.assert_array_equal(found[usual], wanted[usual].astype(jnp.bfloat16).astype(np.float32))
    assert not np.isnan(found).any()


def test_what_cannot_be_served_is_nan_and_nothing_else():
    """Inside `jax.jit` nobody can look at the exponents."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (SHARED.num_experts, SHARED.hidden, SHARED.inter // 2), np.uint8)
    codes[3, 5] = 0x22
    exponents = np.full((SHARED.num_experts, SHARED.hidden, SHARED.inter // 32), 118, np.uint8)
    exponents[3, 5, 0] = 90
    gate_up = rng.integers(0, 256, (SHARED.num_experts, 2 * SHARED.inter, SHARED.hidden // 2), np.uint8)
    gate_up_exponents = np.full((SHARED.num_experts, 2 * SHARED.inter, SHARED.hidden // 32), 118, np.uint8)
    weights = jax.jit(mm.pack_experts)(gate_up, gate_up_exponents, codes, exponents)
    x, ids, topk_weights = make_inputs(40, SHARED)
    y = np.asarray(mm.moe(x, weights, ids, topk_weights), np.float32)
    has_expert = (np.asarray(ids) == 3).any(axis=1)
    assert np.isnan(y[has_expert, 5]).all()
    y[has_expert, 5] = 0
    assert np.isfinite(y).all()
