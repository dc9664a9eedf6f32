"""The router as families of models call it (the table in docs/routing.md), against each family's own formula."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import jax_megamoe as mm

Array = np.ndarray[Any, np.dtype[Any]]


class Family(NamedTuple):
    """How one token is routed, in float64, and the keywords that say so."""

    num_experts: int
    top_k: int
    options: dict[str, Any]
    route: Callable[[Array, Array, int], tuple[Array, Array]]


def best(values: Array, count: int) -> Array:
    return np.argsort(-values, kind="stable")[:count]


def biased(score: Callable[[Array], Array], groups: tuple[int, int] = (1, 1)) -> Callable[..., tuple[Array, Array]]:
    """Scores for the weights, scores and bias for the selection."""

    def route(logits: Array, bias: Array, top_k: int) -> tuple[Array, Array]:
        scores = score(logits)
        selection = (scores + bias).reshape(groups[0], -1)
        kept = best(np.sort(selection, -1)[:, -2:].sum(-1), groups[1])
        allowed = np.isin(np.arange(groups[0]), kept)[:, None]
        ids = best(np.where(allowed, selection, -np.inf).ravel(), top_k)
        return ids, scores[ids] / scores[ids].sum()

    return route


def softmax_then_top_k(logits: Array, _: Array, top_k: int) -> tuple[Array, Array]:
    scores = np.exp(logits) / np.exp(logits).sum()
    ids = best(scores, top_k)
    return ids, scores[ids] / scores[ids].sum()


def top_k_then_softmax(logits: Array, router_bias: Array, top_k: int) -> tuple[Array, Array]:
    ids = best(logits + router_bias, top_k)
    chosen = np.exp((logits + router_bias)[ids])
    return ids, chosen / chosen.sum()


def greatest_groups(logits: Array, _: Array, top_k: int) -> tuple[Array, Array]:
    scores = np.exp(logits) / np.exp(logits).sum()
    groups = scores.reshape(8, -1)
    allowed = np.isin(np.arange(8), best(groups.max(-1), 3))[:, None]
    ids = best(np.where(allowed, groups, 0).ravel(), top_k)
    return ids, scores[ids]


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def sqrt_softplus(z: Array) -> Array:
    return np.sqrt(np.log1p(np.exp(z)))


SIGMOID: dict[str, Any] = {"scoring": "sigmoid"}
V2 = {"renormalize": False, "num_groups": 8, "top_groups": 3, "group_scoring": "max"}
FAMILIES = {
    "Qwen3-MoE": Family(128, 8, {}, softmax_then_top_k),
    "Qwen3.5": Family(512, 10, {}, softmax_then_top_k),
    "gpt-oss": Family(128, 4, {}, top_k_then_softmax),
    "DeepSeek-V2": Family(160, 6, V2, greatest_groups),
    "DeepSeek-V3": Family(256, 8, SIGMOID | {"num_groups": 8, "top_groups": 4}, biased(sigmoid, (8, 4))),
    "DeepSeek-V4": Family(384, 6, {"scoring": "sqrtsoftplus"}, biased(sqrt_softplus)),
    "GLM-4.5": Family(160, 8, SIGMOID, biased(sigmoid)),
    "GLM-5.3": Family(288, 7, SIGMOID, biased(sigmoid)),
    "Kimi-K2": Family(384, 8, SIGMOID, biased(sigmoid)),
    "Kimi-K3": Family(896, 16, SIGMOID, biased(sigmoid)),
    "MiniMax-M2": Family(256, 8, SIGMOID, biased(sigmoid)),
    "Hy3": Family(192, 8, SIGMOID, biased(sigmoid)),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_family(family):
    rng = np.random.default_rng(family.num_experts)
    logits = rng.normal(size=(16, family.num_experts)).astype(np.float32)
    bias = (rng.normal(size=family.num_experts) * 0.1).astype(np.float32)
    has_bias = family.options.get("scoring", "softmax") != "softmax"
    # gpt-oss has a bias of the router's product, which is a part of the logits.
    given = logits + bias if family.route is top_k_then_softmax else logits
    ids, weights = mm.route(given, family.top_k, bias=bias if has_bias else None, **family.options)
    for token, row in enumerate(logits.astype(np.float64)):
        wanted_ids, wanted = family.route(row, bias.astype(np.float64), family.top_k)
        np.testing.assert_array_equal(ids[token], wanted_ids)
        np.testing.assert_allclose(weights[token], wanted, rtol=2e-5)
