"""The fused kernel with shared experts, against the reference and against calls of its own parts, on a Hopper GPU."""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.weight_layout import Format
from tests.support.cases import LARGEST_MODELS, ODD_ROUTINGS
from tests.support.compare import bits, difference
from tests.support.layer_with_options import OPTIONS
from tests.support.problems import Sizes, make_problem, make_weights
from tests.support.skips import gpu_tests, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())

ODD = Sizes(hidden=640, inter=384, num_experts=8, top_k=4)
all_formats = pytest.mark.parametrize("weight_format", get_args(Format))

moe: Any = jax.jit(functools.partial(mm.moe, **OPTIONS))
reference: Any = jax.jit(functools.partial(mm.reference.moe, **OPTIONS))


def shared_of(sizes: Sizes, count: int, weight_format: Format = "fp8_block", seed: int = 9) -> mm.ExpertWeights:
    return make_weights(sizes._replace(num_experts=count), seed, weight_format)


def scale_of(tokens: int, count: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(tokens).random((tokens, count), np.float32) + 0.05)


def assert_is_the_references(problem: Any, shared: mm.ExpertWeights, **more: Any) -> None:
    options = {"shared": shared, "shared_weights": scale_of(len(problem.x), shared.num_experts), **more}
    y, load = moe(*problem, **options)
    wanted, wanted_load = reference(*problem, **options)
    assert np.isfinite(np.asarray(y, np.float32)).all()
    np.testing.assert_array_equal(load, wanted_load)
    assert difference(y, wanted) < 1e-4


@all_formats
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tokens", [1, 8, 40, 129, 700, 3000])
def test_token_counts(tokens, count, weight_format):
    assert_is_the_references(
        make_problem(tokens, ODD, weight_format=weight_format), shared_of(ODD, count, weight_format)
    )


@all_formats
@pytest.mark.parametrize("routing", ODD_ROUTINGS)
@pytest.mark.parametrize("tokens", [2, 300])
def test_routings(routing, tokens, weight_format):
    problem, shared = make_problem(tokens, ODD, routing, weight_format=weight_format), shared_of(ODD, 1, weight_format)
    assert_is_the_references(problem, shared)
    assert_is_the_references(problem, shared, num_valid_tokens=jnp.int32(tokens - 1))


@pytest.mark.parametrize("tokens", [1, 64, 600])
@pytest.mark.parametrize(("hidden", "inter"), LARGEST_MODELS.values(), ids=LARGEST_MODELS)
def test_shapes(hidden, inter, tokens):
    sizes = Sizes(hidden, inter, 8, 6)
    assert_is_the_references(make_problem(tokens, sizes), shared_of(sizes, 1))


@all_formats
@pytest.mark.parametrize("tokens", [5, 200])
def test_layers_are_stacked(tokens, weight_format):
    x, _, ids, topk_weights = make_problem(tokens, ODD)
    layers = [make_weights(ODD, seed, weight_format) for seed in range(3)]
    shared = [shared_of(ODD, 2, weight_format, seed) for seed in range(10, 13)]
    stacked, shared_stacked = mm.stack_experts(layers), mm.stack_experts(shared)
    for layer in range(3):
        y, _ = moe(x, stacked, ids, topk_weights, layer=jnp.int32(layer), shared=shared_stacked)
        alone = moe(x, layers[layer], ids, topk_weights, shared=shared[layer])[0]
        np.testing.assert_array_equal(bits(y), bits(alone))


@pytest.mark.parametrize("tokens", [1, 48, 400])
def test_as_experts_that_every_token_names(tokens):
    """The same bits as from one array of weights with the shared experts in it."""
    x, weights, ids, topk_weights = make_problem(tokens, ODD, "masked")
    shared, scale = shared_of(ODD, 2), scale_of(tokens, 2)
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), weights.leaves, shared.leaves)
    joined = dataclasses.replace(weights, **both._asdict(), num_experts=ODD.num_experts + 2)
    used = np.where(np.asarray(ids) < ODD.num_experts, ids, -1)
    all_ids = np.concatenate([used, np.tile(ODD.num_experts + np.arange(2, dtype=np.int32), (tokens, 1))], 1)
    wanted = mm.moe(x, joined, jnp.asarray(all_ids), jnp.concatenate([topk_weights, scale], 1))
    y = mm.moe(x, weights, ids, topk_weights, shared=shared, shared_weights=scale)
    np.testing.assert_array_equal(bits(y), bits(wanted))


@pytest.mark.parametrize("tokens", [1, 100])
def test_another_format_is_a_kernel_of_its_own(tokens):
    assert_is_the_references(make_problem(tokens, ODD, weight_format="mxfp4"), shared_of(ODD, 1))
