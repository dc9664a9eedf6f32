"""Routers of models and beyond, with logits on which the kernel and array code have to agree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_megamoe.primitives.route import RouteParams
from jax_megamoe.routing_arrays import route_arrays

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
# What differs in the kernel: more than one value of a thread, groups, each scoring, nothing but one expert.
_ALWAYS = {"qwen3", "deepseek-v2", "deepseek-v3", "sqrtsoftplus in groups", "kimi-k3", "one"}
all_routers = pytest.mark.parametrize(
    ("num_experts", "top_k", "options"),
    [
        pytest.param(*each, id=name, marks=[] if name in _ALWAYS else pytest.mark.exhaustive)
        for name, each in ROUTERS.items()
    ],
)


def params_of(top_k: int, options: dict[str, Any]) -> RouteParams:
    defaults = RouteParams(top_k, "softmax", 1, 1, "sum_of_two", True)
    return defaults._replace(**{"top_groups": options.get("num_groups", 1), **options})


def array_code(logits: Any, top_k: int, options: dict[str, Any], bias: Any = None) -> tuple[Any, Any]:
    params = params_of(top_k, options)

    def run(logits: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return route_arrays(logits, bias, None, None, None, None, **params._asdict())

    ids, weights = jax.jit(run)(logits, bias)
    return ids, weights


def spread(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Distinct logits of each token, so far apart that no rounding of scores changes their order."""
    return rng.permuted(np.broadcast_to(np.linspace(-6, 6, shape[-1]), shape), axis=-1).astype(np.float32)


def spread_bias(rng: np.random.Generator, num_experts: int) -> np.ndarray:
    """Multiples of what scores are far from, so that biased ones are no ties either."""
    return rng.permutation(num_experts).astype(np.float32) / 8


def odd_logits(num_experts: int, tokens: int) -> np.ndarray:
    """NaN, infinities, and what underflows, in some of the logits and in all of the first eight tokens'."""
    rng = np.random.default_rng(0)
    logits = spread(rng, (tokens, num_experts))
    for value in (np.nan, np.inf, -np.inf, -1e30, -200.0, 3e38):
        logits[rng.random(logits.shape) < 0.03] = value
    logits[:8] = np.array([np.nan, np.inf, -np.inf, 0, -1e38, -100, -180, 1e38])[:, None]
    return logits


def odd_biases(num_experts: int) -> list[np.ndarray | None]:
    infinite = np.full(num_experts, -np.inf, np.float32)
    infinite[num_experts // 2] = np.nan
    return [None, np.zeros(num_experts, np.float32), infinite]


def ties(num_experts: int) -> np.ndarray:
    """Few different logits, zeros of both signs among them."""
    rng = np.random.default_rng(1)
    logits = rng.integers(-2, 3, (300, num_experts)).astype(np.float32)
    return np.where(logits == 0, rng.choice([0.0, -0.0], logits.shape), logits).astype(np.float32)


def assert_alike(found: Any, wanted: Any, tiny: float = 0.0) -> None:
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=3e-6, atol=tiny)


def assert_as_array_code(route: Any, num_experts: int, top_k: int, options: dict[str, Any], tokens: int) -> None:
    """`route(logits, bias)` on logits that are far apart, with a bias and without."""
    rng = np.random.default_rng(tokens)
    logits = spread(rng, (tokens, num_experts))
    for bias in (None, spread_bias(rng, num_experts)):
        assert_alike(route(logits, bias), array_code(jnp.asarray(logits), top_k, options, bias))


def assert_as_array_code_where_odd(
    route: Any, num_experts: int, top_k: int, options: dict[str, Any], tokens: int
) -> None:
    """On what is no number, and where scores underflow; ids are distinct experts there, too."""
    logits = odd_logits(num_experts, tokens)
    for bias in odd_biases(num_experts):
        found = route(logits, bias)
        assert_alike(found, array_code(jnp.asarray(logits), top_k, options, bias), tiny=1e-44)
        ids = np.asarray(found[0])
        assert ((ids >= 0) & (ids < num_experts)).all() and all(len(set(row)) == top_k for row in ids)
