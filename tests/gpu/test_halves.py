"""swapAB with two CTAs on each SM, for few tokens of weights that are decoded, on a Hopper GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.primitives import _library
from tests.support.cases import HALVES, MODELS, ODD_ROUTINGS
from tests.support.compare import bits, difference
from tests.support.layer_with_options import moe, reference
from tests.support.problems import Problem, Sizes, make_problem
from tests.support.skips import gpu_tests, unless, why_no_hopper, why_no_testing
from tests.support.virtual_ranks import assert_as_one_rank

pytestmark = gpu_tests(why_no_hopper())

needs_testing = unless(why_no_testing())
LEAST, MOST = 4, 120  # tokens of HALVES in halves
CHUNK = 40  # tokens


def make(tokens: int, routing: str = "uniform", sizes: Sizes = HALVES, seed: int = 0, num_ranks: int = 1) -> Problem:
    """A problem whose launches, by the rule, have two CTAs on each SM."""
    choice = _library._core.launch_choice(  # type: ignore[union-attr]
        tokens // num_ranks,
        sizes.top_k,
        sizes.hidden,
        sizes.inter,
        sizes.num_experts // num_ranks,
        "mxfp4",
        num_ranks,
        num_sms=132,
        bytes_per_microsecond=0,
    )
    assert choice["ctas_per_sm"] == 2
    return make_problem(tokens, sizes, routing, seed, weight_format="mxfp4")


def assert_is_the_references(problem: Problem, **options: Any) -> None:
    y, load = moe(*problem, **options)
    wanted, wanted_load = reference(*problem, **options)
    assert np.isfinite(np.asarray(y, np.float32)).all()
    np.testing.assert_array_equal(load, wanted_load)
    assert difference(y, wanted) < 1e-4


@pytest.mark.parametrize("tokens", [*range(LEAST, 33), *range(36, MOST, 7), MOST])
def test_token_counts(tokens):
    """Odd numbers of K blocks in both projections; chunks of one to forty tokens, and second ones."""
    assert_is_the_references(make(tokens))


@pytest.mark.parametrize("routing", ODD_ROUTINGS)
@pytest.mark.parametrize("tokens", [LEAST, 17, CHUNK, CHUNK + 1, MOST])
def test_routings(routing, tokens):
    """All tokens for one expert are several chunks beyond 40."""
    assert_is_the_references(make(tokens, routing))


@pytest.mark.parametrize("tokens", [6, 16, 70])
@pytest.mark.parametrize(("hidden", "inter"), [size for size in MODELS.values() if size[1] >= 1408], ids=str)
def test_shapes(hidden, inter, tokens):
    assert_is_the_references(make(tokens, sizes=Sizes(hidden, inter, 16, 6)))


@pytest.mark.parametrize("tokens", [LEAST, 11, 32, 60, 90, MOST])
def test_a_token_has_the_bits_that_it_has_among_more(tokens):
    """With more tokens a CTA has its SM alone, and other pipelines; no sum changes its order."""
    more = make_problem(MOST + 8, HALVES, weight_format="mxfp4")
    few = more._replace(x=more.x[:tokens], ids=more.ids[:tokens], topk_weights=more.topk_weights[:tokens])
    np.testing.assert_array_equal(bits(moe(*few)[0]), bits(moe(*more)[0])[:tokens])


@pytest.mark.parametrize("tokens", [LEAST, MOST])
def test_again_and_again(tokens):
    """Launches in halves and others in turns."""
    few, more = make(tokens), make_problem(MOST + 1, HALVES, weight_format="mxfp4")
    wanted = bits(moe(*few)[0]), bits(moe(*more)[0])
    for _ in range(50):
        results = moe(*few)[0], moe(*more)[0]
        for y, bits_before in zip(results, wanted, strict=True):
            np.testing.assert_array_equal(bits(y), bits_before)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": mm.SwiGLU(alpha=1.702, up_offset=1.0), "activation_clamp": 7.0},
        {"activation": mm.SiTU(4.0, 25.0)},
    ],
    ids=["gpt-oss", "situ"],
)
@pytest.mark.parametrize("tokens", [LEAST, MOST])
def test_activations(tokens, options):
    problem = make(tokens, "masked")
    y = jax.jit(functools.partial(mm.moe, **options))(*problem)
    wanted = jax.jit(functools.partial(mm.reference.moe, **options))(*problem)
    assert difference(y, wanted) < 1e-4


@pytest.mark.parametrize("tokens", [LEAST, 16, CHUNK, MOST])
def test_biases_and_shared_experts(tokens):
    """Shared experts have all tokens: with more than a chunk, a CTA has its SM alone."""
    rng = np.random.default_rng(tokens)

    def weights(num_experts: int) -> mm.ExpertWeights:
        gate, up = (rng.normal(size=(num_experts, HALVES.inter, HALVES.hidden)).astype(np.float32) for _ in range(2))
        down = rng.normal(size=(num_experts, HALVES.hidden, HALVES.inter)).astype(np.float32)
        gate_up_bias, down_bias = (
            rng.normal(size=(num_experts, rows)).astype(np.float32) for rows in (2 * HALVES.inter, HALVES.hidden)
        )
        return mm.quantize_experts(
            gate / 25, up / 25, down / 40, gate_up_bias=gate_up_bias, down_bias=down_bias, format="mxfp4"
        )

    problem = make(tokens)._replace(weights=weights(HALVES.num_experts))
    assert_is_the_references(problem)
    assert_is_the_references(problem, shared=weights(2))


def test_nan_stays_with_its_token():
    x, weights, ids, topk_weights = make(16)
    clean = bits(moe(x, weights, ids, topk_weights)[0])
    y = moe(x.at[3, 5].set(jnp.nan), weights, ids, topk_weights)[0]
    assert np.isnan(np.asarray(y[3], np.float32)).all()
    others = np.arange(16) != 3
    np.testing.assert_array_equal(bits(y)[others], clean[others])


@needs_testing
@pytest.mark.parametrize(
    "options",
    [{}, {"ctas": 16, "seed": 5, "late_ctas": 6}, {"ctas": 16, "late_ctas": 15}],
    ids=["", "late CTAs and pauses", "all CTAs but two are late"],
)
@pytest.mark.parametrize("routing", ["uniform", *ODD_ROUTINGS])
@pytest.mark.parametrize(("tokens", "num_ranks"), [(LEAST, 1), (32, 2), (MOST, 2), (9, 4)])
def test_ranks(tokens, num_ranks, routing, options):
    """`tokens` of each rank; of `ctas` and `late_ctas` twice as many."""
    sizes = HALVES._replace(num_experts=HALVES.num_experts * num_ranks)
    make(tokens * num_ranks, sizes=sizes, num_ranks=num_ranks)
    assert_as_one_rank(tokens, num_ranks, routing, sizes, "mxfp4", **options)


@needs_testing
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("ctas", "milliseconds"), [(100, 50), (131, 50), (132, 50)])
def test_while_something_holds_sms(ctas, milliseconds):
    problem = make(MOST)
    wanted = bits(moe(*problem)[0])
    _library._core.hold_sms(jax.devices("gpu")[0].local_hardware_id, ctas, milliseconds)  # type: ignore[union-attr]
    for y, _ in [moe(*problem) for _ in range(10)]:
        np.testing.assert_array_equal(bits(y), wanted)
