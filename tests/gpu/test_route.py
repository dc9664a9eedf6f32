"""The router's kernel against its array code, on a Hopper GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from tests.support.routers import (
    all_routers,
    array_code,
    assert_alike,
    assert_as_array_code,
    assert_as_array_code_where_odd,
    spread,
    ties,
)
from tests.support.skips import gpu_tests, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())

route: Any = functools.partial(mm.route, implementation="cuda")


def route_with(top_k: int, options: dict[str, Any]) -> Any:
    return jax.jit(lambda logits, bias: route(logits, top_k, bias=bias, **options))


@all_routers
@pytest.mark.parametrize("tokens", [1, 33, 3000])
def test_selects_and_weighs_as_array_code(tokens, num_experts, top_k, options):
    assert_as_array_code(route_with(top_k, options), num_experts, top_k, options, tokens)


@all_routers
def test_what_is_no_number(num_experts, top_k, options):
    assert_as_array_code_where_odd(route_with(top_k, options), num_experts, top_k, options, tokens=200)


@pytest.mark.parametrize("num_experts", [32, 256, 1000])
def test_of_equal_scores_the_lower_id_comes_first(num_experts):
    grouped: dict[str, Any] = {"scoring": "sigmoid", "num_groups": 4, "top_groups": 2}
    for options in ({}, grouped):
        logits = jnp.asarray(ties(num_experts))
        assert_alike(route(logits, 8, **options), array_code(logits, 8, options))


def test_leading_dimensions_types_vmap_and_no_tokens():
    logits = jnp.asarray(spread(np.random.default_rng(2), (4, 5, 64)))
    wanted = array_code(logits, 4, {})
    assert_alike(route(logits, 4), wanted)
    assert_alike(jax.vmap(lambda row: route(row, 4))(logits), wanted)
    assert_alike(jax.vmap(lambda row: route(row, 4), in_axes=1, out_axes=1)(logits), wanted)
    narrow = logits.astype(jnp.bfloat16)
    assert_alike(route(narrow, 4), array_code(narrow, 4, {}))
    ids, weights = route(logits[:0], 4)
    assert ids.shape == weights.shape == (0, 5, 4)


def test_derivatives_are_those_of_array_code():
    logits = jnp.asarray(spread(np.random.default_rng(3), (6, 32)))
    found = jax.grad(lambda x: jnp.sum(route(x, 3)[1][:, 0]))(logits)
    wanted = jax.grad(lambda x: jnp.sum(array_code(x, 3, {})[1][:, 0]))(logits)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
