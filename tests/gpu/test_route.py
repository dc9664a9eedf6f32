"""The router's kernel against its array code, on a Hopper GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.primitives.route import RouteParams
from jax_megamoe.routing_arrays import route_arrays
from tests.support.skips import gpu_tests, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())

# Experts, top-k, and other arguments.
ROUTERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "mixtral": (8, 2, {}),
    "qwen3": (128, 8, {}),
    "no renormalisation": (128, 8, {"renormalize": False}),
    "deepseek-v2": (160, 6, {"renormalize": False, "num_groups": 8, "top_groups": 3, "group_scoring": "max"}),
    "deepseek-v3": (256, 8, {"scoring": "sigmoid", "num_groups": 8, "top_groups": 4}),
    "deepseek-v4": (384, 6, {"scoring": "sqrtsoftplus"}),
    "sqrtsoftplus in groups": (64, 6, {"scoring": "sqrtsoftplus", "num_groups": 16, "top_groups": 3}),
    "sqrtsoftplus as it is": (256, 6, {"scoring": "sqrtsoftplus", "renormalize": False}),
    "groups of one": (32, 4, {"scoring": "sigmoid", "num_groups": 32, "top_groups": 5}),
    "kimi-k3": (896, 16, {"scoring": "sigmoid"}),
    "largest": (1024, 32, {"scoring": "sigmoid"}),
    "odd": (100, 7, {"num_groups": 5, "top_groups": 2}),
    "one": (1, 1, {}),
}
all_routers = pytest.mark.parametrize(("num_experts", "top_k", "options"), ROUTERS.values(), ids=ROUTERS)


def array_code(logits: Any, top_k: int, options: dict[str, Any], bias: Any = None) -> tuple[Any, Any]:
    defaults = RouteParams(top_k, "softmax", 1, 1, "sum_of_two", True)
    params = defaults._replace(**{"top_groups": options.get("num_groups", 1), **options})

    def run(logits: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return route_arrays(logits, bias, None, None, None, None, **params._asdict())

    ids, weights = jax.jit(run)(logits, bias)
    return ids, weights


def assert_alike(found: Any, wanted: Any) -> None:
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=2e-6, atol=0)


def spread(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Distinct logits of each token, so far apart that no rounding of scores changes their order."""
    return (rng.permuted(np.broadcast_to(np.linspace(-6, 6, shape[-1]), shape), axis=-1)).astype(np.float32)


@all_routers
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("tokens", [1, 33, 3000])
def test_selects_and_weighs_as_array_code(tokens, biased, num_experts, top_k, options):
    rng = np.random.default_rng(tokens)
    logits = jnp.asarray(spread(rng, (tokens, num_experts)))
    # Multiples of what scores are far from, so that biased ones are no ties either.
    bias = jnp.asarray(rng.permutation(num_experts).astype(np.float32) / 8) if biased else None
    route = jax.jit(functools.partial(mm.route, top_k=top_k, **options))
    assert "jax_megamoe.route" in route.lower(logits, bias=bias).as_text()
    assert_alike(route(logits, bias=bias), array_code(logits, top_k, options, bias))


@all_routers
def test_what_is_no_number(num_experts, top_k, options):
    rng = np.random.default_rng(0)
    logits = spread(rng, (200, num_experts))
    for value in (np.nan, np.inf, -np.inf, -1e30, -200.0, 3e38):
        logits[rng.random(logits.shape) < 0.03] = value
    logits[:8] = np.array([np.nan, np.inf, -np.inf, 0, -1e38, -100, -180, 1e38])[:, None]
    for bias in (None, jnp.zeros(num_experts), jnp.full(num_experts, -np.inf).at[num_experts // 2].set(np.nan)):
        found = mm.route(jnp.asarray(logits), top_k, bias=bias, **options)
        wanted = array_code(jnp.asarray(logits), top_k, options, bias)
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_allclose(found[1], wanted[1], rtol=3e-6, atol=1e-44)
        ids = np.asarray(found[0])
        assert ((ids >= 0) & (ids < num_experts)).all() and all(len(set(row)) == top_k for row in ids)


@pytest.mark.parametrize("num_experts", [32, 256, 1000])
def test_of_equal_scores_the_lower_id_comes_first(num_experts):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.integers(-2, 3, (500, num_experts)).astype(np.float32) * rng.choice([0.0, -0.0, 1.0]))
    grouped: dict[str, Any] = {"scoring": "sigmoid", "num_groups": 4, "top_groups": 2}
    for options in ({}, grouped):
        assert_alike(mm.route(logits, 8, **options), array_code(logits, 8, options))


def test_leading_dimensions_types_vmap_and_no_tokens():
    rng = np.random.default_rng(2)
    logits = jnp.asarray(spread(rng, (4, 5, 64)))
    wanted = array_code(logits, 4, {})
    assert_alike(mm.route(logits, 4), wanted)
    assert_alike(jax.vmap(lambda row: mm.route(row, 4))(logits), wanted)
    assert_alike(jax.vmap(lambda row: mm.route(row, 4), in_axes=1, out_axes=1)(logits), wanted)
    biases = jnp.asarray(rng.random((4, 64)))
    by_bias = jax.vmap(lambda row, bias: mm.route(row, 4, bias=bias))(logits, biases)
    for row, bias, ids in zip(logits, biases, by_bias[0], strict=True):
        np.testing.assert_array_equal(ids, array_code(row, 4, {}, bias)[0])
    wide = logits.astype(jnp.bfloat16)
    assert_alike(mm.route(wide, 4), array_code(wide, 4, {}))
    ids, weights = mm.route(logits[:0], 4)
    assert ids.shape == weights.shape == (0, 5, 4)


def test_derivatives_are_those_of_array_code():
    logits = jnp.asarray(spread(np.random.default_rng(3), (6, 32)))
    found = jax.grad(lambda x: jnp.sum(mm.route(x, 3)[1][:, 0]))(logits)
    wanted = jax.grad(lambda x: jnp.sum(array_code(x, 3, {})[1][:, 0]))(logits)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
