"""`activation`: what an expert makes of its gate and up projections, against formulas of the models' own."""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError
from tests.support import numpy_model
from tests.support.cases import exhaustive
from tests.support.cuda_lowering import cuda_text
from tests.support.expert_layer import Layer, assert_matches_model, make_layer, natural_weights
from tests.support.meshes import AUTO, MESHES, make_mesh, place_all


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gpt_oss(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate * sigmoid(1.702 * gate) * (up + 1)


def kimi_k3(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return 4 * np.tanh(gate / 4) * sigmoid(gate) * 25 * np.tanh(up / 25)


# Options of `moe`, and the formula.
ACTIVATIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "gpt-oss": ({"activation": mm.SwiGLU(alpha=1.702, up_offset=1.0), "activation_clamp": 0.7}, gpt_oss),
    "offset alone": ({"activation": mm.SwiGLU(up_offset=-2)}, lambda gate, up: gate * sigmoid(gate) * (up - 2)),
    "kimi-k3": ({"activation": mm.SiTU(4.0, 25.0)}, kimi_k3),
    "narrow": (
        {"activation": mm.SiTU(beta=0.25, linear_beta=0.5)},
        lambda gate, up: 0.25 * np.tanh(gate / 0.25) * sigmoid(gate) * 0.5 * np.tanh(up / 0.5),
    ),
}
all_activations = pytest.mark.parametrize(("options", "formula"), ACTIVATIONS.values(), ids=ACTIVATIONS)


def with_formula(layer: Layer, options: dict[str, Any], formula: Any) -> Layer:
    y, load = numpy_model.moe(
        *(np.asarray(layer.x), natural_weights(), np.asarray(layer.ids), np.asarray(layer.topk_weights)),
        activation_clamp=options.get("activation_clamp"),
        activate=formula,
    )
    return layer._replace(y=y, load=load)


@all_activations
@pytest.mark.parametrize(
    "function",
    [mm.moe, exhaustive(mm.reference.moe)],
    ids=["moe", "reference"],
)
def test_is_the_models(function, options, formula):
    layer = make_layer()
    y = jax.jit(functools.partial(function, **options))(*layer[:4])
    assert_matches_model(y, with_formula(layer, options, formula))
    assert not np.array_equal(np.asarray(y), np.asarray(jax.jit(function)(*layer[:4])))


@all_activations
def test_on_a_mesh(each_platform, options, formula):
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    y = jax.jit(functools.partial(mm.moe, **options))(*place_all(mesh, layer))
    assert_matches_model(y, with_formula(layer, options, formula))


def test_the_default_is_silu():
    layer = make_layer()
    numbers: Any = (np.float32(1), np.array(0))
    for activation in (None, mm.SwiGLU(), mm.SwiGLU(alpha=1, up_offset=0), mm.SwiGLU(*numbers)):
        assert_matches_model(mm.moe(*layer[:4], activation=activation), layer)


def test_nan_and_infinities_survive():
    layer = make_layer()
    x = layer.x.at[3].set(jnp.nan).at[5, 7].set(jnp.inf)
    for options, _ in ACTIVATIONS.values():
        y = np.asarray(
            mm.moe(x, layer.weights, jnp.zeros_like(layer.ids), jnp.ones_like(layer.topk_weights), **options)
        )
        assert np.isnan(y[[3, 5]].astype(np.float32)).all() and np.isfinite(np.delete(y, [3, 5], 0).astype(float)).all()


def test_what_the_kernel_is_told(built):
    text = cuda_text(functools.partial(mm.moe, activation=mm.SwiGLU(1.5, 1.0), activation_clamp=7.0), *make_layer()[:4])
    assert "activation_alpha = 1.500000e+00 : f32" in text and "activation_up_offset = 1.000000e+00 : f32" in text
    assert "activation_clamp = 7.000000e+00 : f32" in text and "situ_beta = 0.000000e+00 : f32" in text
    text = cuda_text(functools.partial(mm.moe, activation=mm.SiTU(4.0, 25.0)), *make_layer()[:4])
    assert "situ_beta = 4.000000e+00 : f32" in text and "situ_linear_beta = 2.500000e+01 : f32" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "silu"}, r"activation is 'silu', wanted SwiGLU\(\.\.\.\), SiTU\(\.\.\.\) or None"),
        ({"activation": mm.SwiGLU}, "activation is <class"),
        ({"activation": mm.SwiGLU(alpha=math.nan)}, "alpha of the activation is nan, wanted a finite FP32 number"),
        ({"activation": mm.SwiGLU(up_offset=True)}, "up_offset of the activation is True"),
        ({"activation": mm.SwiGLU(alpha=1e39)}, "alpha of the activation is 1e"),
        ({"activation": mm.SiTU(0.0, 1.0)}, "activation is SiTU.*, wanted numbers from 1e-30 to 1e"),
        ({"activation": mm.SiTU(4.0, 1e38)}, "activation is SiTU.*, wanted numbers from 1e-30 to 1e"),
        ({"activation": mm.SiTU(1.0, cast(float, jnp.float32(1)))}, "linear_beta of the activation is"),
        ({"activation": mm.SiTU(4.0, 25.0), "activation_clamp": 7.0}, "activation_clamp is 7.0 beside SiTU"),
    ],
)
def test_what_is_refused(options, message):
    for function in (mm.moe, mm.reference.moe):
        with pytest.raises(ArgumentError, match=message):
            function(*make_layer()[:4], **options)
