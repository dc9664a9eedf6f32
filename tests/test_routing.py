"""The router against loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_megamoe as mm
from jax_megamoe.errors import DTypeError, MegaMoEError, ShapeError

SCORES = {
    "softmax": lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum(),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "sqrtsoftplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
}


def model(logits, top_k, scoring, bias, num_groups, top_groups, renormalize):
    """One token, in float64."""
    scores = SCORES[scoring](logits.astype(np.float64))
    selection = scores if bias is None else scores + bias
    groups = selection.reshape(num_groups, -1)
    group_scores = np.sort(groups, axis=1)[:, -2:].sum(1)
    kept = set(sorted(range(num_groups), key=lambda g: (-group_scores[g], g))[:top_groups])
    candidates = [e for e in range(len(logits)) if e // groups.shape[1] in kept]
    ids = sorted(candidates, key=lambda e: (-selection[e], e))[:top_k]
    probs = scores[ids]
    return ids, probs / probs.sum() if renormalize else probs


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    scoring=st.sampled_from(sorted(SCORES)),
    biased=st.booleans(),
    groups=st.sampled_from([(1, None), (4, 2), (4, 4), (8, 3), (16, 5)]),
    top_k=st.integers(1, 5),
    renormalize=st.booleans(),
)
def test_route_selects_and_weighs_as_the_model_does(seed, scoring, biased, groups, top_k, renormalize):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(6, 16)).astype(np.float32)
    bias = rng.normal(size=16).astype(np.float32) if biased else None
    num_groups, top_groups = groups
    ids, probs = mm.route(
        logits,
        top_k,
        scoring=scoring,
        bias=bias,
        num_groups=num_groups,
        top_groups=top_groups,
        renormalize=renormalize,
    )
    assert ids.dtype == jnp.int32 and probs.dtype == jnp.float32
    for token in range(len(logits)):
        wanted_ids, wanted_probs = model(
            logits[token], top_k, scoring, bias, num_groups, top_groups or num_groups, renormalize
        )
        np.testing.assert_array_equal(ids[token], wanted_ids)
        np.testing.assert_allclose(probs[token], wanted_probs, rtol=2e-5)


@pytest.mark.parametrize("scoring", sorted(SCORES))
def test_ties_go_to_the_lower_id(scoring):
    logits = jnp.array([1.0, 2.0, 2.0, 1.0, 2.0, 2.0])
    assert mm.route(logits, 3, scoring=scoring)[0].tolist() == [1, 2, 4]
    assert mm.route(jnp.zeros(8), 4, scoring=scoring, num_groups=4, top_groups=2)[0].tolist() == [0, 1, 2, 3]


def test_bias_selects_but_does_not_weigh():
    logits = jnp.array([0.0, 1.0, 2.0, 3.0])
    ids, probs = mm.route(logits, 2, scoring="sigmoid", bias=jnp.array([9.0, 0.0, 8.0, 0.0]), renormalize=False)
    assert ids.tolist() == [0, 2]
    np.testing.assert_allclose(probs, jax.nn.sigmoid(logits[ids]))


def test_leading_dimensions_jit_and_narrow_logits():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 16), jnp.bfloat16)
    ids, probs = jax.jit(mm.route, static_argnames=("top_k", "scoring"))(logits, top_k=4, scoring="sigmoid")
    assert ids.shape == probs.shape == (2, 3, 4)
    flat_ids, flat_probs = mm.route(logits.reshape(6, 16).astype(jnp.float32), 4, scoring="sigmoid")
    np.testing.assert_array_equal(ids.reshape(6, 4), flat_ids)
    np.testing.assert_allclose(probs.reshape(6, 4), flat_probs, rtol=1e-6)
    assert mm.route(jnp.zeros((0, 16)), 2)[0].shape == (0, 2)


def test_scores_that_underflow_give_no_nan():
    assert np.asarray(mm.route(jnp.full(8, -200.0), 2, scoring="sigmoid")[1]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"top_k": 9}, ShapeError, "top_k is 9, wanted 1 to 8"),
        ({"top_k": 0}, ShapeError, "top_k is 0"),
        ({"top_k": 5, "num_groups": 4, "top_groups": 2}, ShapeError, "top_k is 5, wanted 1 to 4"),
        ({"top_k": 2, "num_groups": 3}, ShapeError, "num_groups is 3, wanted a divisor of 8"),
        ({"top_k": 2, "num_groups": 4, "top_groups": 5}, ShapeError, "top_groups is 5, wanted 1 to num_groups = 4"),
        ({"top_k": 2, "bias": jnp.zeros(7)}, ShapeError, r"bias has shape \(7,\), wanted \(8,\)"),
        ({"top_k": 2, "scoring": "tanh"}, MegaMoEError, "scoring is 'tanh', wanted one of softmax"),
        ({"top_k": 2, "logits": jnp.zeros((2, 8), jnp.int32)}, DTypeError, "logits has dtype int32"),
        ({"top_k": 2, "logits": jnp.float32(0)}, ShapeError, "logits is a scalar"),
    ],
)
def test_unfit_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        mm.route(**{"logits": jnp.zeros((2, 8)), **arguments})
