"""A small expert layer, with the result that the NumPy model has for it, for the tests of the public function."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jax_megamoe as mm
from tests.support import numpy_model
from tests.support.compare import difference

E, H, I, K = 8, 256, 128, 3
# The order of FP32 sums, over ranks too, and FP8 values that it moves across a rounding boundary.
TOLERANCE = 1e-7
# Also other roundings inside the tensor cores, and of exp: more such values (docs/numerics.md).
GPU_TOLERANCE = 1e-4


class Layer(NamedTuple):
    """Arguments of `moe`, and what it should return."""

    x: Any
    weights: mm.ExpertWeights
    ids: Any
    topk_weights: Any
    y: Any
    load: Any


@functools.cache
def natural_weights(seed: int = 0) -> numpy_model.Experts:
    rng = np.random.default_rng(seed)
    shapes = ((E, I, H), (E, I, H), (E, H, I))
    return numpy_model.quantize_experts(*(rng.normal(size=s).astype(np.float32) * s[-1] ** -0.5 for s in shapes))


@functools.cache
def packed_weights(seed: int = 0) -> mm.ExpertWeights:
    return mm.pack_experts(*natural_weights(seed))


@functools.cache
def make_layer(num_tokens: int = 16, seed: int = 0) -> Layer:
    """Tokens with some unused slots (whose weights are NaN) and some ids that name no expert."""
    rng = np.random.default_rng(100 + num_tokens)
    x = rng.normal(size=(num_tokens, H)).astype(numpy_model.BF16)
    ids = rng.integers(-1, E + 1, (num_tokens, K)).astype(np.int32)
    topk_weights = rng.random((num_tokens, K), np.float32)
    topk_weights[(ids < 0) | (ids >= E)] = np.nan
    y, load = x, np.zeros(E, np.int64)
    if num_tokens:
        y, load = numpy_model.moe(x, natural_weights(seed), ids, topk_weights)
    return Layer(jnp.asarray(x), packed_weights(seed), jnp.asarray(ids), jnp.asarray(topk_weights), y, load)


def assert_matches_model(y: Any, layer: Layer) -> None:
    """The result is the model's; also token by token, since one wrong token of many moves the whole little."""
    assert y.dtype == jnp.bfloat16
    on_gpu = any(device.platform == "gpu" for device in y.devices())
    tolerance = GPU_TOLERANCE if on_gpu else TOLERANCE
    rows = np.asarray(y).reshape(layer.y.shape)
    for row, wanted in zip(rows, layer.y, strict=True):
        assert difference(row, wanted) < 10 * tolerance
    assert difference(rows, layer.y) < tolerance
