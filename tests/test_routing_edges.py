"""The router's edges: infinities and NaN, scores that underflow, wide integers, arrays split over explicit axes, flags."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, ShardingError
from tests.support.meshes import EXPLICIT, make_mesh, place


def test_infinite_logits_and_nan_in_the_bias():
    logits = jnp.array([[1.0, jnp.inf, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    ids, weights = mm.route(logits, 2, scoring="sqrtsoftplus", renormalize=False)
    np.testing.assert_array_equal(ids, [[1, 3], [3, 2]])
    assert np.isposinf(weights[0, 0]) and np.isfinite(np.asarray(weights)[[0, 1, 1], [1, 0, 1]]).all()
    renormalised = np.asarray(mm.route(logits, 2, scoring="sqrtsoftplus")[1])
    assert np.isnan(renormalised[0, 0]) and np.isfinite(renormalised[1]).all()
    ids, weights = mm.route(logits, 2, scoring="sigmoid", bias=jnp.array([jnp.nan, 0.0, 0.0, 0.0]))
    assert ids[:, 0].tolist() == [0, 0] and np.isfinite(weights).all()


def test_biases_of_wide_integers_keep_their_value():
    for first in (2**32, 3 * 10**9):
        bias = np.zeros(4, np.int64)
        bias[0] = first
        assert mm.route(np.zeros((3, 4), np.float32), 2, bias=bias)[0][:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("logits", "wanted"),
    [
        ([10, -500, -400, -300], [0, 3, 2, 1]),
        ([-900, -800, -400, -20], [3, 2, 1, 0]),
        ([-180, -175, -np.inf, -173], [3, 1, 0, 2]),
    ],
)
def test_order_of_scores_that_underflow(logits, wanted):
    ids, weights = mm.route(np.array([logits], np.float32), 4, scoring="sqrtsoftplus")
    assert ids[0].tolist() == wanted and np.isfinite(weights).all()


def test_nan_is_seen_beside_infinities():
    logits = np.array([[1, 2, 3, np.nan]], np.float32)
    ids, weights = mm.route(logits, 2, scoring="sigmoid", bias=np.array([np.inf, np.inf, 0, 0], np.float32))
    assert ids[0, 0] == 3 and np.isnan(weights).all()
    beside = np.array([[np.inf, np.inf, np.nan, 1]], np.float32)
    ids, weights = mm.route(beside, 2, scoring="sqrtsoftplus", renormalize=False)
    assert ids[0, 0] == 2 and np.isnan(weights[0, 0])


@pytest.mark.parametrize("with_context", [False, True], ids=["mesh of arguments", "mesh of context"])
def test_logits_and_bias_split_over_explicit_axes(with_context):
    mesh = make_mesh({"data": 2, "expert": 4}, EXPLICIT)
    rng = np.random.default_rng(3)
    logits, bias = rng.normal(size=(4, 6, 8)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    tokens, table = rng.integers(0, 12, (4, 6)), rng.integers(0, 8, (12, 2))
    split = place(mesh, logits, "data", None, "expert")
    with jax.set_mesh(mesh) if with_context else contextlib.nullcontext():
        for options in (
            {"bias": place(mesh, bias, "expert"), "num_groups": 4, "top_groups": 2},
            {"token_ids": place(mesh, tokens, "data"), "hash_table": place(mesh, table, "expert")},
            {"token_ids": place(mesh, tokens), "hash_table": place(mesh, table), "scoring": "sqrtsoftplus"},
        ):
            found = jax.jit(functools.partial(mm.route, top_k=2, **options))(split)
            wanted = mm.route(logits, 2, **{name: jax.device_get(value) for name, value in options.items()})
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6)
                assert jax.typeof(a).sharding.spec == P("data", None, None)
    other = make_mesh({"x": 8}, EXPLICIT)
    with pytest.raises(ShardingError, match="bias is on the mesh .* and logits on .* wanted one mesh"):
        mm.route(split, 2, bias=place(other, bias, "x"))


@pytest.mark.parametrize("value", ["no", 2, None, np.ones(2)], ids=str)
def test_flags_are_bools(value):
    with pytest.raises(ArgumentError, match="renormalize is .*, wanted True or False"):
        mm.route(np.zeros((2, 4), np.float32), 2, renormalize=value)


def test_choices_are_texts():
    with pytest.raises(ArgumentError, match="scoring is array.*, wanted one of"):
        mm.route(np.zeros((2, 4), np.float32), 2, scoring=np.array(["softmax", "sigmoid"]))  # type: ignore[arg-type]
