"""The router's second bias, for the tokens of images: what it selects, and that other tokens do not notice."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, DTypeError, MegaMoEError, ShapeError
from tests.support.compare import bits
from tests.support.meshes import EXPLICIT, make_mesh, place

T, E, K, VOCABULARY = 12, 16, 3, 20


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    scoring=st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    kind=st.sampled_from(["biased", "plain", "hash", "groups"]),
    renormalize=st.booleans(),
)
def test_each_token_is_routed_by_the_bias_of_its_kind(seed, scoring, kind, renormalize):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(T, E)).astype(np.float32)
    image_bias, is_image = rng.normal(size=E).astype(np.float32), rng.random(T) < 0.5
    options: dict[str, Any] = {"scoring": scoring, "renormalize": renormalize}
    groups: dict[str, Any] = {"num_groups": 4, "top_groups": 2} if kind == "groups" else {}
    of_text: dict[str, Any] = groups
    if kind in ("biased", "groups"):
        of_text = groups | {"bias": rng.normal(size=E)}
    if kind == "hash":
        # The ids of images' tokens are beyond the vocabulary.
        tokens = np.where(is_image, VOCABULARY + 3, rng.integers(0, VOCABULARY, T))
        of_text = {"token_ids": tokens, "hash_table": rng.integers(0, E, (VOCABULARY, K))}
    ids, weights = mm.route(logits, K, **options, **of_text, image_bias=image_bias, is_image=is_image)
    wanted = mm.route(logits, K, **options, **of_text)
    of_images = mm.route(logits, K, **options, **groups, bias=image_bias)
    np.testing.assert_array_equal(ids, np.where(is_image[:, None], of_images[0], wanted[0]))
    np.testing.assert_array_equal(bits(weights), bits(jnp.where(is_image[:, None], of_images[1], wanted[1])))


def test_a_mask_is_an_argument_of_one_program():
    logits, image_bias = jnp.zeros((2, 3, E)), jnp.arange(E, dtype=jnp.float32)
    run: Any = jax.jit(lambda mask: mm.route(logits, 1, image_bias=image_bias, is_image=mask)[0])
    for mask in (jnp.zeros((2, 3), bool), jnp.ones((2, 3), bool), jnp.array([[True, False, True]] * 2)):
        np.testing.assert_array_equal(run(mask)[..., 0], jnp.where(mask, E - 1, 0))
    assert run._cache_size() == 1


@pytest.mark.parametrize("with_context", [False, True], ids=["mesh of arguments", "mesh of context"])
def test_on_explicit_axes(with_context):
    mesh = make_mesh({"data": 2, "expert": 4}, EXPLICIT)
    rng = np.random.default_rng(3)
    logits, bias = rng.normal(size=(4, 6, E)).astype(np.float32), rng.normal(size=E).astype(np.float32)
    mask = rng.random((4, 6)) < 0.5
    split = place(mesh, logits, "data", None, "expert")
    with jax.set_mesh(mesh) if with_context else contextlib.nullcontext():
        found = jax.jit(
            lambda logits, bias, mask: mm.route(logits, K, scoring="sigmoid", image_bias=bias, is_image=mask)
        )(split, place(mesh, bias, "expert"), place(mesh, mask, "data"))
    for a, b in zip(found, mm.route(logits, K, scoring="sigmoid", image_bias=bias, is_image=mask), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        assert jax.typeof(a).sharding.spec == P("data", None, None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_bias": np.zeros(E)}, ArgumentError, "is_image is None, wanted an array beside image_bias: "),
        ({"is_image": np.zeros(T, bool)}, ArgumentError, "image_bias is None, wanted an array beside is_image: "),
        (
            {"image_bias": np.zeros(E), "is_image": np.zeros(T, int)},
            DTypeError,
            "is_image has dtype int64, wanted bool: ",
        ),
        (
            {"image_bias": np.zeros(E), "is_image": np.zeros((T, 1), bool)},
            ShapeError,
            r"is_image has shape \(12, 1\), wanted \(12,\) like logits without the experts: ",
        ),
        (
            {"image_bias": np.zeros(E - 1), "is_image": np.zeros(T, bool)},
            ShapeError,
            r"image_bias has shape \(15,\), wanted \(16,\): ",
        ),
        (
            {"image_bias": np.zeros(E, bool), "is_image": np.zeros(T, bool)},
            DTypeError,
            "image_bias has dtype bool, wanted float32: ",
        ),
    ],
)
def test_unfit_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        mm.route(np.zeros((T, E), np.float32), K, **arguments)
    assert isinstance(raised.value, MegaMoEError)
