"""One token of weights that are decoded, which each CTA quantises for itself, on a Hopper GPU."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.primitives import _library
from tests.support.cases import MODELS, ODD_ROUTINGS
from tests.support.compare import bits, difference
from tests.support.layer_with_options import moe, reference
from tests.support.problems import Problem, Sizes, make_problem
from tests.support.skips import gpu_tests, unless, why_no_hopper, why_no_testing

pytestmark = gpu_tests(why_no_hopper())

needs_testing = unless(why_no_testing())
SIZES = Sizes(hidden=640, inter=384, num_experts=16, top_k=6)


def make(sizes: Sizes = SIZES, routing: str = "uniform", seed: int = 0, *, is_lone: bool = True) -> Problem:
    """One token, and whether its launch is to have it in each CTA."""
    sizes_of_launch = (sizes.top_k, sizes.hidden, sizes.inter, sizes.num_experts)
    choice = _library._core.launch_choice(  # type: ignore[union-attr]
        1, *sizes_of_launch, "mxfp4", 1, num_sms=132, bytes_per_microsecond=0
    )
    assert choice["has_lone_token"] == is_lone
    return make_problem(1, sizes, routing, seed, weight_format="mxfp4")


def assert_is_the_references(problem: Problem, **options: Any) -> None:
    y, load = moe(*problem, **options)
    wanted, wanted_load = reference(*problem, **options)
    assert np.isfinite(np.asarray(y, np.float32)).all()
    np.testing.assert_array_equal(load, wanted_load)
    assert difference(y, wanted) < 1e-4


@pytest.mark.parametrize("hidden", [128, 256, 384, 1152, 2048, 2176, 4096, 7168, 8064, 8192])
def test_columns(hidden):
    """Odd numbers of K blocks, of which the last stage has one; warps with one to four items, and without any."""
    assert_is_the_references(make(Sizes(hidden, 256, 8, 4)))


@pytest.mark.parametrize(("sizes", "routing"), [(Sizes(8320, 256, 8, 4), "uniform"), (Sizes(640, 384, 16, 9), "one")])
def test_what_is_too_large_takes_the_way_of_more_tokens(sizes, routing):
    assert_is_the_references(make(sizes, routing, is_lone=False))


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("routing", ["uniform", *ODD_ROUTINGS])
def test_routings(routing, top_k):
    """With "one", the token names an expert up to eight times."""
    assert_is_the_references(make(SIZES._replace(top_k=top_k), routing))


@pytest.mark.parametrize(("hidden", "inter"), MODELS.values(), ids=MODELS)
def test_shapes(hidden, inter):
    assert_is_the_references(make_problem(1, Sizes(hidden, inter, 8, 6), weight_format="mxfp4"))


def test_many_tokens():
    """One call for each has the bits that the tokens have together: no sum changes its order."""
    together = make_problem(12, SIZES, weight_format="mxfp4")
    y = bits(moe(*together)[0])
    for t in range(12):
        one = slice(t, t + 1)
        alone = moe(together.x[one], together.weights, together.ids[one], together.topk_weights[one])[0]
        np.testing.assert_array_equal(bits(alone), y[one])


def test_again_and_again():
    """In turns with launches of more tokens, at call sites of their own."""
    one, more = make(), make_problem(3, SIZES, weight_format="mxfp4")
    wanted = bits(moe(*one)[0]), bits(moe(*more)[0])
    for _ in range(50):
        for y, bits_before in zip((moe(*one)[0], moe(*more)[0]), wanted, strict=True):
            np.testing.assert_array_equal(bits(y), bits_before)


@pytest.mark.parametrize("fill", [np.nan, np.inf, 0.0])
def test_values(fill):
    """A token of zeros has the smallest scale; the experts have biases."""
    problem = make()
    if fill == 0.0:
        assert_is_the_references(problem._replace(x=problem.x * 0))
    else:
        y = moe(problem.x.at[0, 3].set(fill), *problem[1:])[0]
        assert np.isnan(np.asarray(y, np.float32)).all()


@pytest.mark.parametrize(
    "options",
    [
        {"activation": mm.SwiGLU(alpha=1.702, up_offset=1.0), "activation_clamp": 7.0},
        {"activation": mm.SiTU(4.0, 25.0)},
    ],
    ids=["gpt-oss", "situ"],
)
def test_options(options):
    problem = make(routing="masked")
    y = jax.jit(functools.partial(mm.moe, **options))(*problem)
    wanted = jax.jit(functools.partial(mm.reference.moe, **options))(*problem)
    assert y.dtype == wanted.dtype and difference(y, wanted) < 1e-4


def test_layers_and_shared_experts():
    problem = make()
    shared = make_problem(1, SIZES._replace(num_experts=2, top_k=1), seed=3, weight_format="mxfp4").weights
    assert_is_the_references(problem, shared=shared)
    other = make(seed=1).weights
    stacked = mm.stack_experts([other, problem.weights])
    y = moe(problem.x, stacked, problem.ids, problem.topk_weights, layer=1)[0]
    np.testing.assert_array_equal(bits(y), bits(moe(*problem)[0]))


@needs_testing
@pytest.mark.timeout(60)
@pytest.mark.parametrize("ctas", [100, 131, 132])
def test_while_something_holds_sms(ctas):
    """CTAs that come late find their units taken, and need nothing of the token."""
    problem = make()
    wanted = bits(moe(*problem)[0])
    _library._core.hold_sms(jax.devices("gpu")[0].local_hardware_id, ctas, 50)  # type: ignore[union-attr]
    for y, _ in [moe(*problem) for _ in range(10)]:
        np.testing.assert_array_equal(bits(y), wanted)
