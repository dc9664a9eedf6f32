"""The router against loops over tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_megamoe as mm
from jax_megamoe.errors import DTypeError, MegaMoEError, ShapeError
from tests.support import boxes, meshes

SCORES = {
    "softmax": lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum(),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "sqrtsoftplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
}

HASH = {"top_k": 2, "token_ids": np.zeros(2, int), "hash_table": np.zeros((9, 2), int)}


def model(logits, top_k, scoring, bias, num_groups, top_groups, renormalize, best_of_group=2):
    """One token, in float64."""
    scores = SCORES[scoring](logits.astype(np.float64))
    selection = scores if bias is None else scores + bias
    groups = selection.reshape(num_groups, -1)
    group_scores = np.sort(groups, axis=1)[:, -best_of_group:].sum(1)
    kept = set(sorted(range(num_groups), key=lambda g: (-group_scores[g], g))[:top_groups])
    candidates = [e for e in range(len(logits)) if e // groups.shape[1] in kept]
    ids = sorted(candidates, key=lambda e: (-selection[e], e))[:top_k]
    topk_weights = scores[ids]
    return ids, topk_weights / topk_weights.sum() if renormalize else topk_weights


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    scoring=st.sampled_from(sorted(SCORES)),
    biased=st.booleans(),
    groups=st.sampled_from([(1, None), (4, 2), (4, 4), (8, 3), (16, 5)]),
    group_scoring=st.sampled_from(["sum_of_two", "max"]),
    top_k=st.integers(1, 5),
    renormalize=st.booleans(),
)
def test_route_selects_and_weighs_as_the_model_does(seed, scoring, biased, groups, group_scoring, top_k, renormalize):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(6, 16)).astype(np.float32)
    bias = rng.normal(size=16).astype(np.float32) if biased else None
    num_groups, top_groups = groups
    ids, topk_weights = mm.route(
        logits,
        top_k,
        scoring=scoring,
        bias=bias,
        num_groups=num_groups,
        top_groups=top_groups,
        group_scoring=group_scoring,
        renormalize=renormalize,
    )
    assert ids.dtype == jnp.int32 and topk_weights.dtype == jnp.float32
    for token in range(len(logits)):
        wanted_ids, wanted_weights = model(
            logits[token],
            top_k,
            scoring,
            bias,
            num_groups,
            top_groups or num_groups,
            renormalize,
            best_of_group=1 if group_scoring == "max" else 2,
        )
        np.testing.assert_array_equal(ids[token], wanted_ids)
        np.testing.assert_allclose(topk_weights[token], wanted_weights, rtol=2e-5)


@pytest.mark.parametrize("scoring", sorted(SCORES))
def test_ties_go_to_the_lower_id(scoring):
    logits = jnp.array([1.0, 2.0, 2.0, 1.0, 2.0, 2.0])
    assert mm.route(logits, 3, scoring=scoring)[0].tolist() == [1, 2, 4]
    assert mm.route(jnp.zeros(8), 4, scoring=scoring, num_groups=4, top_groups=2)[0].tolist() == [0, 1, 2, 3]


def test_bias_selects_but_does_not_weigh():
    logits = jnp.array([0.0, 1.0, 2.0, 3.0])
    ids, topk_weights = mm.route(logits, 2, scoring="sigmoid", bias=jnp.array([9.0, 0.0, 8.0, 0.0]), renormalize=False)
    assert ids.tolist() == [0, 2]
    np.testing.assert_allclose(topk_weights, jax.nn.sigmoid(logits[ids]))


def test_leading_dimensions_jit_and_narrow_logits():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 16), jnp.bfloat16)
    ids, topk_weights = jax.jit(mm.route, static_argnames=("top_k", "scoring"))(logits, top_k=4, scoring="sigmoid")
    assert ids.shape == topk_weights.shape == (2, 3, 4)
    flat_ids, flat_weights = mm.route(logits.reshape(6, 16).astype(jnp.float32), 4, scoring="sigmoid")
    np.testing.assert_array_equal(ids.reshape(6, 4), flat_ids)
    np.testing.assert_allclose(topk_weights.reshape(6, 4), flat_weights, rtol=1e-6)
    assert mm.route(jnp.zeros((0, 16)), 2)[0].shape == (0, 2)


def test_scores_that_underflow_give_no_nan():
    assert np.asarray(mm.route(jnp.full(8, -200.0), 2, scoring="sigmoid")[1]).tolist() == [0, 0]


def test_groups_by_their_maximum_or_by_the_sum_of_their_two_best():
    logits = np.log(np.array([0.5, 0.01, 0.3, 0.29], np.float32))
    options: dict[str, Any] = {"num_groups": 2, "top_groups": 1}
    assert mm.route(logits, 2, group_scoring="max", **options)[0].tolist() == [0, 1]
    assert mm.route(logits, 2, group_scoring="sum_of_two", **options)[0].tolist() == [2, 3]
    assert mm.route(logits, 2, **options)[0].tolist() == [2, 3]


@pytest.mark.parametrize("lead", [(0,), (), (0, 3), (3, 0), (2, 0, 5), (1, 1)])
@pytest.mark.parametrize("jit", [False, True])
def test_any_leading_dimensions_also_of_size_zero(lead, jit):
    token_ids, table = np.zeros(lead, np.int32), np.array([[5, 2, 1]], np.int32)
    cases: list[dict[str, Any]] = [
        {},
        {"num_groups": 8, "top_groups": 3},
        {"num_groups": 8, "top_groups": 3, "group_scoring": "max", "scoring": "sqrtsoftplus", "bias": np.zeros(16)},
        {"token_ids": token_ids, "hash_table": table, "scoring": "sigmoid"},
    ]
    for options in cases:
        route: Any = functools.partial(mm.route, top_k=3, **options)
        ids, weights = (jax.jit(route) if jit else route)(np.zeros((*lead, 16), np.float32))
        assert (ids.shape, ids.dtype) == ((*lead, 3), jnp.int32)
        assert (weights.shape, weights.dtype) == ((*lead, 3), jnp.float32)
        wanted = table[0] if "hash_table" in options else [0, 1, 2]
        np.testing.assert_array_equal(ids, np.broadcast_to(wanted, ids.shape))
        np.testing.assert_allclose(weights, np.broadcast_to(np.float32(1 / 3), ids.shape), rtol=1e-6)


def test_sqrtsoftplus_is_right_down_to_the_smallest_float():
    logits = np.linspace(-206, 30, 4000, dtype=np.float32)
    wanted = SCORES["sqrtsoftplus"](logits.astype(np.float64))
    scores = np.asarray(mm.route(logits[:, None], 1, scoring="sqrtsoftplus", renormalize=False)[1])[:, 0].astype(float)
    # A unit in the last place of the smallest floats is 2^-149.
    np.testing.assert_allclose(scores, wanted, rtol=2e-6, atol=2.0**-149)
    assert scores[0] == 2.0**-149 and (logits < -174.7).sum() > 500


@pytest.mark.parametrize("largest", [0.0, -15.0, -17.0, -88.0, -100.0, -170.0, -190.0, -1e4])
def test_sqrtsoftplus_orders_and_weighs_small_scores(largest):
    rng = np.random.default_rng(0)
    logits = (largest - 20 * rng.random((50, 16))).astype(np.float32)
    # Multiplied by exp(-shift / 2), so that the model does not underflow either.
    shifted = logits.astype(np.float64) - (largest if largest < -100 else 0)
    for num_groups in (1, 4):
        top_groups = (num_groups + 1) // 2
        ids, weights = mm.route(logits, 4, scoring="sqrtsoftplus", num_groups=num_groups, top_groups=top_groups)
        for token in range(len(logits)):
            scores = np.exp(shifted[token] / 2) if largest < -100 else SCORES["sqrtsoftplus"](shifted[token])
            groups = np.sort(scores.reshape(num_groups, -1), axis=1)[:, -2:].sum(1)
            allowed = np.argsort(-groups)[:top_groups]
            wanted = sorted((e for e in range(16) if e * num_groups // 16 in allowed), key=lambda e: -scores[e])[:4]
            np.testing.assert_array_equal(ids[token], wanted)
            np.testing.assert_allclose(weights[token], scores[wanted] / scores[wanted].sum(), rtol=2e-6)


def test_gradients_of_small_scores_are_finite():
    def second_weight(logits):
        return mm.route(logits, 2, scoring="sqrtsoftplus")[1][1]

    # The quotient of exp(x / 2) and the sum of two: p * (1 - p) / 2.
    for largest in (-40.0, -120.0, -300.0):
        p = 1 / (1 + np.exp(0.5))
        gradient = jax.grad(second_weight)(jnp.array([largest, largest - 1, largest - 50]))
        np.testing.assert_allclose(gradient, [-p * (1 - p) / 2, p * (1 - p) / 2, 0], rtol=1e-5)


@pytest.mark.parametrize("group_scoring", ["sum_of_two", "max"])
def test_gradients_go_through_the_weights_of_selected_experts(group_scoring):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 16)), jnp.float32)
    options: dict[str, Any] = {"num_groups": 4, "top_groups": 2, "group_scoring": group_scoring}
    ids = mm.route(logits, 3, scoring="sigmoid", **options)[0]

    def routed(logits):
        return jnp.sum(mm.route(logits, 3, scoring="sigmoid", renormalize=False, **options)[1] ** 2)

    def gathered(logits):
        return jnp.sum(jnp.take_along_axis(jax.nn.sigmoid(logits), ids, axis=-1) ** 2)

    np.testing.assert_allclose(jax.grad(routed)(logits), jax.grad(gathered)(logits), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("scoring", sorted(SCORES))
@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "top_groups": 2}])
def test_nan_logits_are_chosen_and_stay_in_their_token(scoring, groups, jit):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, 16)).astype(np.float32)
    route: Any = functools.partial(mm.route, top_k=4, scoring=scoring, **groups)
    route = jax.jit(route) if jit else route
    clean_ids, clean_weights = map(np.asarray, route(logits))
    logits[1] = np.nan
    # Processors make NaNs with the sign set, and top_k orders them last.
    logits[3, 6], logits[3, 13] = np.nan, -np.float32(np.nan)
    ids, weights = map(np.asarray, route(logits))
    assert ids[1].tolist() == [0, 1, 2, 3] and np.isnan(weights[[1, 3]]).all()
    assert ids[3, :2].tolist() == ([0, 1] if scoring == "softmax" else [6, 13])
    assert len(set(ids[3])) == 4 and ids.min() >= 0 and ids.max() < 16
    np.testing.assert_array_equal(ids[[0, 2, 4]], clean_ids[[0, 2, 4]])
    np.testing.assert_array_equal(weights[[0, 2, 4]], clean_weights[[0, 2, 4]])


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(
        st.sampled_from([np.nan, -np.nan, np.inf, -np.inf, 0.0, 1.0, -300.0, 3e38]), min_size=12, max_size=12
    ),
    bias=st.lists(st.sampled_from([0.0, -np.inf, np.inf, np.nan, 1.0]), min_size=6, max_size=6),
    scoring=st.sampled_from(sorted(SCORES)),
    group_scoring=st.sampled_from(["sum_of_two", "max"]),
)
def test_ids_are_distinct_and_name_experts_whatever_the_logits(logits, bias, scoring, group_scoring):
    values = np.array(logits, np.float32).reshape(2, 6)
    groups: dict[str, Any] = {"num_groups": 3, "top_groups": 2, "group_scoring": group_scoring}
    for options in ({}, groups):
        for added in (None, np.array(bias, np.float32)):
            ids = np.asarray(mm.route(values, 3, scoring=scoring, bias=added, **options)[0])
            assert ids.min() >= 0 and ids.max() < 6
            assert all(len(set(row)) == 3 for row in ids)
            assert not options or all(len(set(row // 2)) <= 2 for row in ids)


@pytest.mark.parametrize("scoring", sorted(SCORES))
def test_a_logit_of_minus_infinity_scores_zero(scoring):
    ids, weights = mm.route(np.array([-np.inf, 1.0, -np.inf, 0.0], np.float32), 3, scoring=scoring)
    scores = SCORES[scoring](np.array([1.0, 0.0]))
    assert ids.tolist() == [1, 3, 0]
    np.testing.assert_allclose(weights, [*scores / scores.sum(), 0], rtol=1e-6)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", sorted(SCORES))
def test_hash_routing_takes_the_tables_experts_and_weighs_them_by_the_logits(scoring, renormalize):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(2, 3, 8)).astype(np.float32)
    table = np.array([rng.permutation(8)[:4] for _ in range(11)])
    token_ids = rng.integers(0, 11, (2, 3))
    ids, weights = mm.route(
        logits, 4, scoring=scoring, renormalize=renormalize, token_ids=token_ids, hash_table=table, bias=np.arange(8.0)
    )
    assert (ids.dtype, weights.dtype) == (np.dtype(np.int32), np.dtype(np.float32))
    np.testing.assert_array_equal(ids, table[token_ids])
    for token in np.ndindex(2, 3):
        wanted = SCORES[scoring](logits[token].astype(np.float64))[table[token_ids[token]]]
        np.testing.assert_allclose(weights[token], wanted / wanted.sum() if renormalize else wanted, rtol=2e-6)


def test_hash_routing_leaves_slots_of_unknown_tokens_and_experts_unused():
    table = jnp.array([[3, 9], [-1, 2], [1, 0]])
    logits = np.zeros((5, 4), np.float32)
    logits[:2, 0] = np.nan
    ids, weights = mm.route(logits, 2, scoring="sigmoid", token_ids=jnp.array([0, 1, 2, 3, -1]), hash_table=table)
    assert ids.tolist() == [[3, -1], [-1, 2], [1, 0], [-1, -1], [-1, -1]]
    assert weights.tolist() == [[1, 0], [0, 1], [0.5, 0.5], [0, 0], [0, 0]]


@pytest.mark.parametrize("box", boxes.ALL)
def test_boxed_arrays_give_what_arrays_give(box):
    logits, bias = np.random.default_rng(3).normal(size=(4, 8)).astype(np.float32), np.arange(8, dtype=np.float32)
    wanted = mm.route(logits, 2, scoring="sigmoid", bias=bias)
    for array in (np.asarray, jnp.asarray):
        got = mm.route(box(array(logits)), 2, scoring="sigmoid", bias=box(array(bias)))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_numpy_ints_are_numbers_of_experts_and_groups():
    counts: dict[str, Any] = {"top_k": np.int64(2), "num_groups": np.int32(4), "top_groups": np.uint8(1)}
    ids, _ = mm.route(jnp.arange(8.0), **counts)
    assert ids.tolist() == [7, 6]


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
        (
            {"top_k": 2, "logits": jnp.zeros((2, 0))},
            ShapeError,
            r"logits has shape \(2, 0\), wanted \[..., E\] with 0 < E < 2.31",
        ),
        ({"top_k": 2, "logits": [[0.0, 1.0]]}, DTypeError, "logits is a list, wanted an array: convert it"),
        ({"top_k": 2, "bias": [0.0] * 8}, DTypeError, "bias is a list, wanted an array: convert it"),
        ({"top_k": 2, "bias": np.zeros(8, complex)}, DTypeError, "bias has dtype complex128, wanted float32"),
        ({"top_k": 2.0}, MegaMoEError, "top_k is 2.0, wanted an int"),
        ({"top_k": True}, MegaMoEError, "top_k is True, wanted an int"),
        ({"top_k": jnp.int32(2)}, MegaMoEError, "top_k is .*, wanted an int known while tracing"),
        ({"top_k": 2, "num_groups": None}, MegaMoEError, "num_groups is None, wanted an int"),
        ({"top_k": 2, "num_groups": 2, "top_groups": 1.0}, MegaMoEError, "top_groups is 1.0, wanted an int"),
        ({"top_k": 2, "group_scoring": "sum"}, MegaMoEError, "group_scoring is 'sum', wanted one of sum_of_two, max"),
        (
            {"top_k": 2, "token_ids": np.zeros(2, int)},
            MegaMoEError,
            "hash_table is None, wanted an array beside token_ids",
        ),
        ({"top_k": 2, "hash_table": np.zeros((9, 2), int)}, MegaMoEError, "token_ids is None, wanted an array beside"),
        (
            HASH | {"hash_table": np.zeros((9, 3), int)},
            ShapeError,
            r"hash_table has shape \(9, 3\), wanted \[vocabulary, 2\]",
        ),
        (HASH | {"token_ids": np.zeros(3, int)}, ShapeError, r"token_ids has shape \(3,\), wanted \(2,\) like logits"),
        (HASH | {"token_ids": np.zeros(2)}, DTypeError, "token_ids has dtype float64, wanted an integer type"),
        (HASH | {"hash_table": np.zeros((9, 2))}, DTypeError, "hash_table has dtype float64, wanted an integer type"),
    ],
)
def test_unfit_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        mm.route(**{"logits": jnp.zeros((2, 8)), **arguments})


@pytest.mark.parametrize("kind", [meshes.AUTO, meshes.EXPLICIT])
@pytest.mark.parametrize("placed", [True, False], ids=["all on the mesh", "logits on the mesh"])
def test_logits_on_a_mesh(kind, placed):
    rng = np.random.default_rng(4)
    logits, tokens = rng.normal(size=(16, 12)).astype(np.float32), np.arange(16)
    table, bias = rng.integers(0, 12, (16, 3)), np.linspace(0, 0.5, 12)
    mesh = meshes.make_mesh({"data": 2, "expert": 4}, kind)
    split = meshes.place(mesh, logits, ("data", "expert"))
    cases: list[dict[str, Any]] = [
        {"scoring": "sqrtsoftplus", "num_groups": 4, "top_groups": 2, "bias": bias},
        {"scoring": "sigmoid", "token_ids": tokens, "hash_table": table},
    ]
    for options in cases:
        wanted = mm.route(logits, 3, **options)
        arrays = {name: value for name, value in options.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in options.items() if name not in arrays}
        if placed:
            entries = {"token_ids": ("data", "expert")}
            arrays = {name: meshes.place(mesh, value, entries.get(name)) for name, value in arrays.items()}
        route: Any = functools.partial(mm.route, top_k=3, **rest)
        for got in (route(split, **arrays), jax.jit(route)(split, **arrays)):
            np.testing.assert_array_equal(got[0], wanted[0])
            np.testing.assert_allclose(got[1], wanted[1], rtol=1e-6)
            assert got[0].sharding.is_equivalent_to(split.sharding, 2)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_hash_tables_and_tokens_of_any_integer_type(dtype, array):
    beyond = np.iinfo(dtype).max  # no token, and no expert; of 64 bits, the lower ones would be
    table, tokens = np.zeros((300, 2), dtype), np.array([0, 100, beyond], dtype)
    table[0], table[100] = (1, beyond), (2, 3)
    wanted = [[1, -1], [2, 3], [-1, -1]]
    if np.dtype(dtype).itemsize == 8:
        tokens[2], table[0, 1] = 2**32, 2**32 + 1
    elif np.dtype(dtype).itemsize == 1:
        tokens[2] = 101  # in the table, whose rows there are zeros
        wanted[2] = [0, 0]
    with jax.enable_x64(array is jnp.asarray):
        ids, weights = mm.route(np.zeros((3, 8), np.float32), 2, token_ids=array(tokens), hash_table=array(table))
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(weights, [[1, 0], [0.5, 0.5], [0.5, 0.5] if wanted[2] == [0, 0] else [0, 0]])
