"""`batch_invariant=True` on a Hopper GPU: a token's bits in calls of any size, and over virtual ranks.

Over several GPUs: tests/gpu/test_expert_parallel.py.
"""

import functools
import importlib
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.weight_layout import Format
from tests.support.cases import GATHERED, SHARED
from tests.support.compare import bits, difference
from tests.support.problems import Problem, Sizes, make_inputs, make_problem, make_weights
from tests.support.skips import gpu_tests, unless, why_no_hopper, why_no_testing
from tests.support.virtual_ranks import assert_as_one_rank

pytestmark = gpu_tests(why_no_hopper())

FORMATS = get_args(Format)
MOST = 3000
# First token, and number of tokens. Of GATHERED: rows gathered, and from 500 tokens on images; clusters from 800 on.
PARTS = [(0, 1), (2999, 1), (1234, 7), (64, 128), (1000, 150), (77, 500), (2000, 800)]
ODD = Sizes(hidden=640, inter=384, num_experts=8, top_k=4)

invariant: Any = jax.jit(functools.partial(mm.moe, batch_invariant=True))


def part_of(problem: Problem, first: int, tokens: int) -> Problem:
    x, weights, ids, topk_weights = problem
    part = slice(first, first + tokens)
    return Problem(x[part], weights, ids[part], topk_weights[part])


def assert_parts_have_the_bits_of_all(problem: Problem, **options: Any) -> None:
    wanted = bits(invariant(*problem, **options))
    for first, tokens in PARTS:
        found = bits(invariant(*part_of(problem, first, tokens), **options))
        np.testing.assert_array_equal(found, wanted[first : first + tokens], err_msg=f"{tokens} tokens from {first} on")


def test_the_calls_take_all_ways_there_are():
    core = importlib.import_module("jax_megamoe._core")

    def choices(sizes: Sizes, **options: Any) -> list[dict[str, Any]]:
        hidden, inter, num_experts, top_k = sizes
        device = {"num_sms": 132, "bytes_per_microsecond": 4_916_736}
        ask = functools.partial(core.launch_choice, **device, **options)
        return [
            ask(tokens, top_k, hidden, inter, num_experts, "fp8_block", 1)
            for tokens in (*(tokens for _, tokens in PARTS), MOST)
        ]

    by_rule, found = choices(GATHERED), choices(GATHERED, batch_invariant=True)
    assert {choice["swap_operands"] for choice in by_rule} == {True, False}
    assert not any(choice["swap_operands"] for choice in found)
    ways = {(choice["gathers_rows"], choice["cluster_ctas"]) for choice in found}
    assert ways == {(True, 1), (False, 1), (False, 2)}


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("routing", ["uniform", "masked"])
@pytest.mark.parametrize("sizes", [SHARED, GATHERED, ODD], ids=["small", "gathered", "odd"])
def test_any_part_of_a_batch(sizes, routing, weight_format):
    assert_parts_have_the_bits_of_all(make_problem(MOST, sizes, routing, weight_format=weight_format))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_other_tokens_around_it(weight_format):
    """The first 40 tokens stay, all others change, and with them the chunks that the first are in."""
    problem = make_problem(MOST, GATHERED, weight_format=weight_format)
    others = make_inputs(MOST, GATHERED, routing="one", seed=1)
    mixed = [
        jnp.concatenate([own[:40], other[40:]])
        for own, other in zip((problem.x, problem.ids, problem.topk_weights), others, strict=True)
    ]
    found = invariant(mixed[0], problem.weights, mixed[1], mixed[2])
    np.testing.assert_array_equal(bits(found)[:40], bits(invariant(*problem))[:40])


@pytest.mark.parametrize("weight_format", FORMATS)
def test_without_the_option_bits_depend_on_the_number_of_tokens(weight_format):
    """So that the tests above can fail."""
    problem = make_problem(MOST, SHARED, weight_format=weight_format)
    run: Any = jax.jit(mm.moe)
    assert (bits(run(*part_of(problem, 0, 100))) != bits(run(*problem))[:100]).any()


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 7, 150, 800])
def test_is_the_references(tokens, weight_format):
    problem = make_problem(tokens, GATHERED, weight_format=weight_format)
    wanted = jax.jit(functools.partial(mm.reference.moe, batch_invariant=True))(*problem)
    assert difference(invariant(*problem), wanted) < 1e-4


@pytest.mark.parametrize("shared_format", ["fp8_block", "mxfp4"], ids=["one kernel", "two"])
def test_shared_experts(shared_format):
    shared = make_weights(SHARED._replace(num_experts=2), seed=3, weight_format=shared_format)
    assert_parts_have_the_bits_of_all(make_problem(MOST, SHARED), shared=shared)


def test_layers_and_valid_tokens():
    problem = make_problem(MOST, SHARED)
    stacked = mm.stack_experts([make_weights(SHARED, seed=1), problem.weights])
    wanted = bits(invariant(*problem))
    found = invariant(*problem._replace(weights=stacked), layer=jnp.int32(1), num_valid_tokens=jnp.int32(20))
    np.testing.assert_array_equal(bits(found)[:20], wanted[:20])


def test_calls_of_several_launches():
    """Scratch of all tokens at a time would be more than a call has."""
    problem = make_problem(65536, Sizes(1024, 128, 8, 32))
    found = bits(invariant(*problem))
    for first in (0, 40_000, 65_500):
        np.testing.assert_array_equal(bits(invariant(*part_of(problem, first, 36))), found[first : first + 36])


@unless(why_no_testing())
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("tokens", [1, 7, 128, 150, 800, 3000])
def test_virtual_ranks(tokens, num_ranks, weight_format):
    assert_as_one_rank(tokens, num_ranks, sizes=GATHERED, weight_format=weight_format, batch_invariant=True)
