"""The public function on one device: arguments, errors, transformations of JAX."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from jax_megamoe.errors import DTypeError, LayoutError, MegaMoEError, ShapeError, ShardingError
from tests.support import numpy_model
from tests.support.compare import difference
from tests.support.expert_layer import E, H, K, assert_matches_model, make_layer, natural_weights, packed_weights


@pytest.fixture(scope="module")
def layer():
    return make_layer()


@pytest.fixture(scope="module")
def stacked() -> mm.ExpertWeights:
    return mm.stack_experts([packed_weights(seed) for seed in range(3)])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_one_device(layer, wrap):
    y, load = wrap(lambda *a: mm.moe(*a, return_expert_load=True))(*layer[:4])
    assert_matches_model(y, layer)
    np.testing.assert_array_equal(load, layer.load)
    assert load.dtype == jnp.int32


def test_types_of_the_results():
    """Checked by mypy too."""
    layer = make_layer()
    for function in (mm.moe, mm.reference.moe):
        y = assert_type(function(layer.x, layer.weights, layer.ids, layer.topk_weights, expert_axis=None), jax.Array)
        both = function(layer.x, layer.weights, layer.ids, layer.topk_weights, return_expert_load=True)
        assert y.shape == assert_type(both, tuple[jax.Array, jax.Array])[0].shape


def test_is_the_reference_bit_by_bit(layer):
    options: dict[str, Any] = {"activation_clamp": 0.5, "routed_scaling_factor": 2.5}
    y = mm.moe(*layer[:4], **options)
    np.testing.assert_array_equal(y, mm.reference.moe(*layer[:4], **options))
    wanted, _ = numpy_model.moe(
        *(np.asarray(layer.x), natural_weights()), layer.ids, np.asarray(layer.topk_weights), **options
    )
    assert difference(y, wanted) < 1e-7


@pytest.mark.parametrize("lead", [(), (1,), (2, 8), (4, 1, 4)])
def test_leading_dimensions(lead):
    layer = make_layer(int(np.prod(lead)))
    x, ids, topk_weights = (jnp.reshape(a, (*lead, a.shape[-1])) for a in (layer.x, layer.ids, layer.topk_weights))
    y = mm.moe(x, layer.weights, ids, topk_weights)
    assert y.shape == x.shape
    assert_matches_model(y, layer)


@pytest.mark.parametrize("lead", [(0,), (3, 0)])
def test_no_tokens(lead):
    x, ids, topk_weights = jnp.zeros((*lead, H), jnp.bfloat16), jnp.zeros((*lead, K), jnp.int32), jnp.zeros((*lead, K))
    y, load = jax.jit(lambda *a: mm.moe(*a, return_expert_load=True))(x, packed_weights(), ids, topk_weights)
    assert y.shape == x.shape and y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(load, np.zeros(E))


def test_numpy_arguments(layer):
    arguments: Any = jax.tree.map(np.asarray, layer[:4])
    assert_matches_model(mm.moe(*arguments), layer)


@pytest.mark.parametrize("implementation", [None, "collective", "reference"])
def test_implementations_of_a_cpu(layer, implementation):
    assert_matches_model(jax.jit(lambda *a: mm.moe(*a, implementation=implementation))(*layer[:4]), layer)


def test_stacked_layers(stacked):
    for index in range(3):
        layer = make_layer(seed=index)
        assert_matches_model(mm.moe(layer.x, stacked, layer.ids, layer.topk_weights, layer=index), layer)


def test_scan_over_layers(stacked):
    layers = [make_layer(seed=index) for index in range(3)]
    x, ids, topk_weights = layers[0].x, layers[0].ids, layers[0].topk_weights

    def step(carry: None, index: jax.Array) -> tuple[None, jax.Array]:
        return carry, mm.moe(x, stacked, ids, topk_weights, layer=index)

    _, ys = jax.jit(lambda: jax.lax.scan(step, None, jnp.arange(3)))()
    for y, layer in zip(ys, layers, strict=True):
        assert_matches_model(y, layer)


def test_scan_over_leaves_serves_too(stacked, layer):
    def step(carry: None, weights: mm.ExpertWeights) -> tuple[None, jax.Array]:
        return carry, mm.moe(layer.x, weights, layer.ids, layer.topk_weights)

    _, ys = jax.lax.scan(step, None, stacked)
    for index, y in enumerate(ys):
        assert_matches_model(y, make_layer(seed=index))


def test_decode_loop(layer):
    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, x = state
        return step + 1, mm.moe(x, layer.weights, layer.ids, layer.topk_weights)

    loop = jax.jit(lambda x: jax.lax.while_loop(lambda state: state[0] < 2, body, (jnp.int32(0), x)))
    once = mm.moe(*layer[:4])
    np.testing.assert_array_equal(loop(layer.x)[1], mm.moe(once, *layer[1:4]))


def test_vmap_over_tokens(layer):
    x, ids, topk_weights = (a.reshape(4, 4, -1) for a in (layer.x, layer.ids, layer.topk_weights))
    f = jax.vmap(lambda x, ids, topk_weights: mm.moe(x, layer.weights, ids, topk_weights, return_expert_load=True))
    y, load = jax.jit(f)(x, ids, topk_weights)
    assert_matches_model(y, layer)
    assert load.shape == (4, E)
    for element, wanted in zip(load, ids, strict=True):
        np.testing.assert_array_equal(element, np.bincount(wanted[(wanted >= 0) & (wanted < E)], minlength=E))


def test_vmap_folds_into_one_call(layer):
    x, ids, topk_weights = (a.reshape(4, 4, -1) for a in (layer.x, layer.ids, layer.topk_weights))
    f = jax.vmap(
        jax.vmap(lambda x, ids, topk_weights: mm.moe(x, layer.weights, ids, topk_weights)),
        in_axes=(1, 1, 1),
        out_axes=1,
    )
    jaxpr = jax.make_jaxpr(f)(x, ids, topk_weights)
    calls = [e for e in jaxpr.eqns if e.primitive.name == "jax_megamoe.moe"]
    assert [str(call.outvars[0].aval) for call in calls] == [f"bfloat16[4,4,{H}]"]
    assert_matches_model(f(x, ids, topk_weights), layer)


def test_vmap_over_some_arguments(layer):
    scale = jnp.asarray([1.0, 2.0], jnp.float32)
    x, weights, ids, topk_weights = layer[:4]
    y = jax.vmap(lambda s: mm.moe(x, weights, ids, topk_weights * s))(scale)
    np.testing.assert_array_equal(y[0], mm.moe(x, weights, ids, topk_weights))
    np.testing.assert_array_equal(y[1], mm.moe(x, weights, ids, topk_weights * 2))


def test_vmap_over_weights_or_layer_is_refused(layer, stacked):
    with pytest.raises(NotImplementedError, match="weights are mapped by jax.vmap"):
        jax.vmap(lambda w: mm.moe(layer.x, w, layer.ids, layer.topk_weights))(stacked)
    with pytest.raises(NotImplementedError, match="layer is mapped by jax.vmap"):
        jax.vmap(lambda i: mm.moe(layer.x, stacked, layer.ids, layer.topk_weights, layer=i))(jnp.arange(3))


@pytest.mark.parametrize("transform", [jax.grad, jax.value_and_grad, jax.jacfwd], ids=lambda f: f.__name__)
@pytest.mark.parametrize("jit", [False, True])
def test_differentiation_is_refused(layer, transform, jit):
    def loss(x: jax.Array) -> jax.Array:
        return mm.moe(x, *layer[1:4]).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="inference only"):
        transform(jax.jit(loss) if jit else loss)(layer.x)


def test_stopped_gradients_pass(layer):
    def loss(scale: jax.Array) -> jax.Array:
        y = mm.moe(layer.x, layer.weights, layer.ids, layer.topk_weights)
        return (y.astype(jnp.float32) * scale).sum()

    assert np.isfinite(jax.grad(loss)(jnp.float32(1)))


def test_traced_once_for_equal_shapes(layer):
    traces = []

    @jax.jit
    def f(*args: Any) -> jax.Array:
        traces.append(1)
        return mm.moe(*args)

    f(*layer[:4])
    f(*layer[:4])
    assert len(traces) == 1


def test_same_bits_every_time_and_in_any_company(layer):
    f = jax.jit(mm.moe)
    y = f(*layer[:4])
    np.testing.assert_array_equal(y, f(*layer[:4]))
    np.testing.assert_array_equal(y[:5], f(layer.x[:5], layer.weights, layer.ids[:5], layer.topk_weights[:5]))


def replaced(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: {**arguments, name: change(arguments[name])}


def with_slots(num_slots: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda a: {**a, **{n: jnp.tile(a[n], 11)[:, :num_slots] for n in ("topk_ids", "topk_weights")}}


def option(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: {**arguments, name: value}


def cast(dtype: Any) -> Callable[[Any], Any]:
    return lambda value: jax.tree.map(lambda leaf: leaf.astype(dtype), value)


def cut_down(weights: mm.ExpertWeights) -> mm.ExpertWeights:
    return dataclasses.replace(weights, down=weights.down[:, :2])


def very_wide(weights: mm.ExpertWeights) -> mm.ExpertWeights:
    return dataclasses.replace(weights, hidden_size=65536 + 128)


def first_half(weights: mm.ExpertWeights) -> mm.ExpertWeights:
    return jax.tree.map(lambda leaf: leaf[: E // 2], weights)


ERRORS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = {
    "x of float32": (replaced("x", cast(jnp.float32)), DTypeError, "x has dtype float32, wanted bfloat16"),
    "x a list": (replaced("x", list), DTypeError, "x is a list, wanted an array of bfloat16"),
    "x of another hidden size": (
        replaced("x", lambda x: x[:, :128]),
        ShapeError,
        r"x has shape \(16, 128\), wanted \[..., 256\]",
    ),
    "ids of int16": (replaced("topk_ids", cast(jnp.int16)), DTypeError, "topk_ids has dtype int16, wanted int32"),
    "ids of float32": (replaced("topk_ids", cast(jnp.float32)), DTypeError, "topk_ids has dtype float32, wanted int32"),
    "ids of fewer tokens": (
        replaced("topk_ids", lambda i: i[:3]),
        ShapeError,
        r"topk_ids has shape \(3, 3\), wanted \[16, k\]",
    ),
    "ids without tokens": (
        replaced("topk_ids", lambda i: i[0]),
        ShapeError,
        r"topk_ids has shape \(3,\), wanted \[16, k\]",
    ),
    "no slots": (with_slots(0), ShapeError, r"topk_ids has shape \(16, 0\), wanted 1 to 32 slots"),
    "33 slots": (with_slots(33), ShapeError, r"topk_ids has shape \(16, 33\), wanted 1 to 32 slots"),
    "topk_weights of bfloat16": (
        replaced("topk_weights", cast(jnp.bfloat16)),
        DTypeError,
        "topk_weights has dtype bfloat16, wanted float32",
    ),
    "topk_weights of fewer slots": (
        replaced("topk_weights", lambda w: w[:, 1:]),
        ShapeError,
        r"topk_weights has shape \(16, 2\), wanted \(16, 3\)",
    ),
    "weights a list": (
        replaced("weights", jax.tree.leaves),
        LayoutError,
        "weights is a list, .* quantize_experts .* pack_experts",
    ),
    "weights of bfloat16": (replaced("weights", cast(jnp.bfloat16)), DTypeError, "weights.gate_up has dtype bfloat16"),
    "weights cut down": (replaced("weights", cut_down), LayoutError, "weights.down has shape"),
    "weights too wide": (
        replaced("weights", very_wide),
        ShapeError,
        "weights have a hidden size of 65664, wanted at most 65536",
    ),
    "weights of half the experts": (replaced("weights", first_half), ShapeError, "weights hold 4 of 8 experts"),
    "layer without a stack": (option("layer", 0), ShapeError, "layer is 0, wanted None"),
    "clamp zero": (
        option("activation_clamp", 0.0),
        MegaMoEError,
        "activation_clamp is 0.0, wanted a positive FP32 number",
    ),
    "clamp NaN": (
        option("activation_clamp", math.nan),
        MegaMoEError,
        "activation_clamp is nan, wanted a positive FP32 number",
    ),
    "factor infinite": (
        option("routed_scaling_factor", math.inf),
        MegaMoEError,
        "routed_scaling_factor is inf, wanted a finite",
    ),
    "implementation unknown": (
        option("implementation", "fast"),
        MegaMoEError,
        "implementation is 'fast', wanted None or one of",
    ),
    "implementation of GPUs": (option("implementation", "cuda"), MegaMoEError, "implementation is 'cuda' on a CPU"),
    "expert axis twice": (
        option("expert_axis", ("a", "a")),
        ShardingError,
        "expert_axis is .*, wanted each mesh axis once",
    ),
}


@pytest.mark.parametrize(("change", "error", "text"), ERRORS.values(), ids=ERRORS)
def test_errors(layer, change, error, text):
    arguments = {"x": layer.x, "weights": layer.weights, "topk_ids": layer.ids, "topk_weights": layer.topk_weights}
    with pytest.raises(error, match=text):
        mm.moe(**change(arguments))


def test_errors_of_layers(layer, stacked):
    arguments = layer.x, stacked, layer.ids, layer.topk_weights
    with pytest.raises(ShapeError, match="layer is None, wanted an index"):
        mm.moe(*arguments)
    with pytest.raises(ShapeError, match="layer is 3, wanted 0 to 2"):
        mm.moe(*arguments, layer=3)
    with pytest.raises(ShapeError, match=r"layer has shape \(2,\), wanted a scalar"):
        mm.moe(*arguments, layer=jnp.zeros(2, jnp.int32))
    with pytest.raises(DTypeError, match="layer has dtype float32"):
        mm.moe(*arguments, layer=jnp.float32(0))
    none = jax.tree.map(lambda leaf: leaf[:0], stacked)
    for index in (0, jnp.int32(0)):
        with pytest.raises(ShapeError, match="weights stack 0 layers, wanted at least one"):
            mm.moe(layer.x, none, layer.ids, layer.topk_weights, layer=index)


def test_errors_come_while_tracing(layer):
    with pytest.raises(ShapeError):
        jax.eval_shape(mm.moe, layer.x[:, :128], *layer[1:4])
    assert jax.eval_shape(mm.moe, *layer[:4]).shape == (16, H)


def test_transposed_weights_are_suspected_where_x_tells():
    hidden, intermediate = 256, 128
    up, down = jnp.ones((2, hidden, intermediate)), jnp.ones((2, intermediate, hidden))  # as MaxText and Flax hold them
    x, ids, topk_weights = jnp.ones((4, hidden), jnp.bfloat16), jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1))
    with pytest.raises(ShapeError, match=r"wanted \[\.\.\., 128\].*quantize_experts\(\.\.\., order=\"in_out\"\)"):
        mm.moe(x, mm.quantize_experts(up, up, down), ids, topk_weights)
    assert mm.moe(x, mm.quantize_experts(up, up, down, order="in_out"), ids, topk_weights).shape == x.shape
