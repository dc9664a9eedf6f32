"""What the docstrings promise about edges: the same from every way to call the layer."""

import dataclasses
import fractions
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import DTypeError, LayoutError, MegaMoEError, ShapeError
from tests.support import boxes, meshes, numpy_model
from tests.support.cases import exhaustive, one_in
from tests.support.expert_layer import E, H, K, assert_matches_model, make_layer, natural_weights, packed_weights

NUM_LAYERS = 3
INT32 = np.iinfo(np.int32)


@functools.cache
def jitted(options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """One function for all tests with these options, so that a program is compiled once."""
    return jax.jit(lambda *a: mm.moe(*a[:4], layer=a[4] if len(a) > 4 else None, **dict(options)))


def in_jit(*operands, **options):
    """With the layer traced, where it is an array."""
    layer = operands[4]
    if layer is None or isinstance(layer, jax.Array):
        return jitted(tuple(options.items()))(*(operands if layer is not None else operands[:4]))
    return jax.jit(lambda *a: mm.moe(*a, layer=layer, **options))(*operands[:4])


def on_mesh(kind, *operands, **options):
    mesh = meshes.make_mesh({"data": 2, "expert": 4}, kind)
    x, weights, ids, topk_weights, layer = operands
    x, ids, topk_weights = (meshes.place(mesh, value, ("data", "expert")) for value in (x, ids, topk_weights))
    weights = meshes.place(mesh, weights, *(["expert"] if layer is None else [None, "expert"]))
    return in_jit(x, weights, ids, topk_weights, layer, **options)


def in_shard_map(*operands, **options):
    mesh = meshes.make_mesh({"data": 2, "expert": 4}, meshes.AUTO)
    tokens, layer = P(("data", "expert")), operands[4]
    experts = P("expert") if layer is None else P(None, "expert")

    def body(x, weights, ids, topk_weights, *traced):
        return mm.moe(x, weights, ids, topk_weights, layer=traced[0] if traced else layer, **options)

    traced = [layer] if isinstance(layer, jax.Array) else []
    in_specs = (tokens, experts, tokens, tokens, *(P() for _ in traced))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=(tokens, P("expert")))
    return jax.jit(mapped)(*operands[:4], *traced)


WAYS: dict[str, Callable[..., Any]] = {
    "eager": lambda *a, **options: mm.moe(*a[:4], layer=a[4], **options),
    "jit": in_jit,
    "reference": lambda *a, **options: mm.reference.moe(*a[:4], layer=a[4], **options),
    "automatic mesh": functools.partial(on_mesh, meshes.AUTO),
    "explicit mesh": functools.partial(on_mesh, meshes.EXPLICIT),
    "shard_map": in_shard_map,
}
each_way = pytest.mark.parametrize("way", WAYS)
FUNCTIONS = {"moe": mm.moe, "reference": mm.reference.moe}
each_function = pytest.mark.parametrize("moe", FUNCTIONS.values(), ids=FUNCTIONS)


def call(way: str, x: Any, weights: Any, ids: Any, topk_weights: Any, layer: Any = None, **options: Any) -> Any:
    return WAYS[way](x, weights, ids, topk_weights, layer, return_expert_load=True, **options)


@functools.cache
def stacked() -> mm.ExpertWeights:
    return mm.stack_experts([packed_weights(seed) for seed in range(NUM_LAYERS)])


@each_way
def test_layers_of_arrays_are_clamped(way):
    layers = [make_layer(seed=seed) for seed in range(NUM_LAYERS)]
    for number, clamped in [(-1, 0), (NUM_LAYERS, 2), (INT32.min, 0)]:
        y, load = call(way, layers[0].x, stacked(), layers[0].ids, layers[0].topk_weights, jnp.int32(number))
        assert_matches_model(y, layers[clamped])
        np.testing.assert_array_equal(load, layers[0].load)


# Number, its type, and the layer that is meant.
INTEGERS = [
    (1, np.uint8, 1),
    (255, np.uint8, 2),
    (-128, np.int8, 0),
    (2**32 - 1, np.uint32, 2),
    # Cast to int32, these are 1, 1, 0 and -1.
    (2**32 + 1, np.int64, 2),
    (-(2**32) + 1, np.int64, 0),
    (2**63 - 2**32, np.int64, 2),
    (2**64 - 1, np.uint64, 2),
]


@pytest.mark.parametrize(
    ("moe", "integer"),
    one_in(
        2, FUNCTIONS, {f"{number} of {dtype.__name__}": (number, dtype, layer) for number, dtype, layer in INTEGERS}
    ),
)
def test_layers_of_any_integer_type(moe, integer):
    number, dtype, clamped = integer
    wanted = make_layer(seed=clamped)
    with jax.enable_x64(True):
        index = jnp.asarray(number, dtype)
        assert index.dtype == dtype
        assert_matches_model(moe(wanted.x, stacked(), wanted.ids, wanted.topk_weights, layer=index), wanted)
        traced = jax.jit(lambda index: moe(wanted.x, stacked(), wanted.ids, wanted.topk_weights, layer=index))
        assert_matches_model(traced(index), wanted)


@each_function
@pytest.mark.parametrize("number", [1, np.int64(1), np.uint8(1), np.array(1), np.array(1, np.int16)])
def test_layers_of_python_and_numpy(moe, number):
    wanted = make_layer(seed=1)
    assert_matches_model(moe(wanted.x, stacked(), wanted.ids, wanted.topk_weights, layer=number), wanted)


def test_loop_counters_of_64_bits():
    layers = [make_layer(seed=seed) for seed in range(NUM_LAYERS)]
    x, _, ids, topk_weights = layers[0][:4]

    def call_layer(index):
        return mm.moe(x, stacked(), ids, topk_weights, layer=index)

    with jax.enable_x64(True):
        _, scanned = jax.lax.scan(lambda carry, index: (carry, call_layer(index)), None, jnp.arange(NUM_LAYERS))
        loop = jax.lax.fori_loop(0, NUM_LAYERS, lambda i, ys: ys.at[i].set(call_layer(i)), jnp.zeros_like(scanned))
    np.testing.assert_array_equal(loop, scanned)
    for y, layer in zip(scanned, layers, strict=True):
        assert_matches_model(y, layer)


@each_function
@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (-1, ShapeError, "layer is -1, wanted 0 to 2: the weights stack 3 layers."),
        (3, ShapeError, "layer is 3, wanted 0 to 2: the weights stack 3 layers."),
        (10**30, ShapeError, f"layer is {10**30}, wanted 0 to 2: the weights stack 3 layers."),
        (np.uint64(2**64 - 1), ShapeError, f"layer is {2**64 - 1}, wanted 0 to 2: the weights stack 3 layers."),
        (np.array(-1), ShapeError, "layer is -1, wanted 0 to 2: the weights stack 3 layers."),
        (True, DTypeError, "layer is True, wanted an integer type: pass a layer's number."),
        (np.True_, DTypeError, "layer has dtype bool, wanted an integer type: pass a layer's number."),
        (1.0, DTypeError, "layer is a float, wanted an array: convert it with jax.numpy.asarray."),
        (jnp.float32(1), DTypeError, "layer has dtype float32, wanted an integer type: pass a layer's number."),
        (jnp.zeros(1, int), ShapeError, "layer has shape (1,), wanted a scalar: call moe once for each layer."),
        (None, ShapeError, "layer is None, wanted an index: the weights are stacked, as weights.gate_up.shape says."),
    ],
)
def test_what_is_no_layer_is_refused(moe, number, error, message):
    layer = make_layer()
    with pytest.raises(error) as raised:
        moe(layer.x, stacked(), layer.ids, layer.topk_weights, layer=number)
    assert str(raised.value) == message


@pytest.mark.parametrize(("ids", "way"), one_in(2, ["unused", "extreme", "duplicates"], list(WAYS)))
def test_ids(way, ids):
    layer, rng = make_layer(), np.random.default_rng(0)
    drawn = {
        "unused": np.full((16, K), -1),
        "extreme": rng.choice([-1, E, INT32.min, INT32.max, E - 1, 0, -E], (16, K)),
        "duplicates": np.repeat(rng.integers(0, E, (16, 1)), K, axis=1),
    }[ids].astype(np.int32)
    topk_weights = np.where((drawn < 0) | (drawn >= E), np.float32(np.nan), rng.random((16, K), np.float32))
    wanted, wanted_load = numpy_model.moe(np.asarray(layer.x), natural_weights(), drawn, topk_weights)
    y, load = call(way, layer.x, layer.weights, jnp.asarray(drawn), jnp.asarray(topk_weights))
    assert_matches_model(y, layer._replace(y=wanted))
    np.testing.assert_array_equal(load, wanted_load)
    assert load.dtype == jnp.int32
    unused = ((drawn < 0) | (drawn >= E)).all(1)
    assert unused.any() != (ids == "duplicates") and not np.asarray(y)[unused].view(np.uint16).any()


@each_way
@pytest.mark.parametrize("lead", [(0,), (0, 3), (8, 0)])
def test_empty_batches(way, lead):
    x, ids, topk_weights = (
        jnp.zeros((*lead, size), t) for size, t in ((H, jnp.bfloat16), (K, jnp.int32), (K, jnp.float32))
    )
    for weights, layer in ((packed_weights(), None), (stacked(), jnp.int32(1))):
        y, load = call(way, x, weights, ids, topk_weights, layer)
        assert (y.shape, y.dtype) == ((*lead, H), jnp.bfloat16)
        assert (load.dtype, load.tolist()) == (jnp.int32, [0] * E)


@each_way
def test_numbers_of_slots(way):
    layer, rng = make_layer(), np.random.default_rng(1)
    ids, topk_weights = rng.integers(0, E, (16, 32)).astype(np.int32), rng.random((16, 32), np.float32)
    wanted, wanted_load = numpy_model.moe(np.asarray(layer.x), natural_weights(), ids, topk_weights)
    y, load = call(way, layer.x, layer.weights, jnp.asarray(ids), jnp.asarray(topk_weights))
    assert_matches_model(y, layer._replace(y=wanted))
    np.testing.assert_array_equal(load, wanted_load)
    for slots in (0, 33):
        with pytest.raises(ShapeError, match=rf"topk_ids has shape \(.*, {slots}\), wanted 1 to 32 slots a token"):
            call(way, layer.x, layer.weights, jnp.zeros((16, slots), jnp.int32), jnp.zeros((16, slots)))


@each_function
@pytest.mark.parametrize(
    "options",
    [
        {"activation_clamp": np.float32(0.25)},
        {"activation_clamp": np.array(0.25)},
        exhaustive({"activation_clamp": fractions.Fraction(1, 4)}),
        {"activation_clamp": 1e300},
        {"activation_clamp": float("inf")},
        exhaustive({"activation_clamp": ml_dtypes.bfloat16(0.25)}),
        exhaustive({"routed_scaling_factor": np.float64(2.5)}),
        {"routed_scaling_factor": np.int8(-3)},
        {"routed_scaling_factor": 0},
    ],
    ids=str,
)
def test_numbers_as_options(moe, options):
    layer = make_layer()
    ids, topk_weights = np.asarray(layer.ids), np.asarray(layer.topk_weights)
    model_options: Any = {name: float(value) for name, value in options.items()}
    wanted, _ = numpy_model.moe(np.asarray(layer.x), natural_weights(), ids, topk_weights, **model_options)
    # Where a number of NumPy could turn the arithmetic into that of 64 bits.
    with jax.enable_x64(True):
        y = moe(*layer[:4], **options)
    assert_matches_model(y, layer._replace(y=wanted))


@each_function
@pytest.mark.parametrize(
    "value", [0, -1.0, 1e-50, np.nan, True, np.True_, 10**400, "1", np.ones(1), jnp.float32(1), 1j]
)
def test_what_is_no_clamp_is_refused(moe, value):
    with pytest.raises(MegaMoEError, match="activation_clamp is .*, wanted a positive FP32 number known while tracing"):
        moe(*make_layer()[:4], activation_clamp=value)


@each_function
@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -np.inf, 1e39, 10**400, False, None, "1", np.ones(1), jnp.float32(1)]
)
def test_what_is_no_factor_is_refused(moe, value):
    with pytest.raises(MegaMoEError, match="routed_scaling_factor is .*, wanted a finite FP32 number known while"):
        moe(*make_layer()[:4], routed_scaling_factor=value)


@each_function
@pytest.mark.parametrize("box", boxes.ALL)
def test_boxed_arguments(moe, box):
    layer, wanted = make_layer(), make_layer(seed=1)
    assert_matches_model(moe(box(layer.x), box(layer.weights), box(layer.ids), box(layer.topk_weights)), layer)
    assert_matches_model(
        moe(box(layer.x), box(stacked()), box(layer.ids), box(layer.topk_weights), layer=box(jnp.int32(1))), wanted
    )
    # Frameworks that put each leaf of a pytree in a box.
    leaves = {name: box(getattr(layer.weights, name)) for name in ("gate_up", "gate_up_scale", "down", "down_scale")}
    assert_matches_model(
        moe(layer.x, dataclasses.replace(layer.weights, **leaves), layer.ids, layer.topk_weights), layer
    )


def test_boxed_arguments_in_jit():
    layer = make_layer()
    box: Any = boxes.Param
    assert_matches_model(jax.jit(lambda x, w, i, p: mm.moe(box(x), box(w), i, box(p)))(*layer[:4]), layer)


@each_function
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [0.0]}, DTypeError, "x is a list, wanted an array of bfloat16: convert it with jax.numpy.asarray."),
        ({"x": np.zeros((16, H), np.float32)}, DTypeError, "x has dtype float32, wanted bfloat16: cast it."),
        (
            {"x": np.zeros((16, H), ml_dtypes.float8_e4m3fn)},
            DTypeError,
            "x has dtype float8_e4m3fn, wanted bfloat16: pass the hidden states, not quantised.",
        ),
        (
            {"topk_ids": np.zeros((16, K), np.float32), "topk_weights": np.zeros((16, K), np.int32)},
            DTypeError,
            "topk_ids has dtype float32 and topk_weights int32, wanted int32 and float32: they are swapped, "
            "pass the ids first.",
        ),
        ({"topk_ids": np.zeros((16, K), np.uint8)}, DTypeError, "topk_ids has dtype uint8, wanted int32: cast it."),
        (
            {"topk_ids": np.zeros((16, K), np.int64)},
            DTypeError,
            "topk_ids has dtype int64, wanted int32: cast it, with -1 for ids that are beyond int32, if there are any.",
        ),
        (
            {"topk_ids": np.zeros((16, K))},
            DTypeError,
            "topk_ids has dtype float64, wanted int32: pass the ids of experts, whole numbers.",
        ),
        (
            {"topk_weights": np.zeros((16, K), ml_dtypes.bfloat16)},
            DTypeError,
            "topk_weights has dtype bfloat16, wanted float32: cast it.",
        ),
        (
            {"weights": np.zeros(3)},
            LayoutError,
            "weights is an array, wanted ExpertWeights: make them with quantize_experts from float weights, "
            "pack_experts from quantised ones, or load_experts from files.",
        ),
        (
            {"weights": [packed_weights(0), boxes.Param(packed_weights(1))]},
            LayoutError,
            "weights is a list, wanted ExpertWeights: pass one, or all of them through stack_experts and which one as "
            "layer.",
        ),
    ],
)
def test_messages_lead_where_it_works(moe, change, error, message):
    layer = make_layer()
    arguments = {"x": layer.x, "weights": layer.weights, "topk_ids": layer.ids, "topk_weights": layer.topk_weights}
    with pytest.raises(error) as raised:
        moe(**{**arguments, **change})
    assert str(raised.value) == message


@each_function
def test_a_symbolic_number_of_tokens_is_refused_in_one_sentence(moe):
    (t,) = export.symbolic_shape("t")
    x, ids, topk_weights = (
        jax.ShapeDtypeStruct((t, n), d) for n, d in ((H, jnp.bfloat16), (K, jnp.int32), (K, jnp.float32))
    )
    with pytest.raises(MegaMoEError) as raised:
        export.export(jax.jit(lambda x, ids, topk_weights: moe(x, packed_weights(), ids, topk_weights)))(
            x, ids, topk_weights
        )
    assert str(raised.value) == (
        f"x has shape (t, {H}), wanted sizes that are numbers, also under jax.export: "
        "export one program for each number of tokens, and pad to the next."
    )


@pytest.mark.parametrize("options", [{}, {"num_groups": 4, "top_groups": 2, "scoring": "sqrtsoftplus"}], ids=str)
def test_route_exports_with_a_symbolic_number_of_tokens(options):
    (t,) = export.symbolic_shape("t")
    route: Any = functools.partial(mm.route, top_k=3, **options)
    exported = export.export(jax.jit(route))(jax.ShapeDtypeStruct((t, 16), jnp.float32))
    for tokens in (1, 5, 8):
        logits = np.random.default_rng(tokens).normal(size=(tokens, 16)).astype(np.float32)
        jax.tree.map(np.testing.assert_array_equal, exported.call(logits), route(logits))


@pytest.mark.parametrize("box", boxes.ALL)
def test_layers_in_boxes_that_hold_ints(box):
    layer = make_layer()
    stacked = mm.stack_experts([packed_weights(0), packed_weights(1)])
    y = mm.moe(layer.x, stacked, layer.ids, layer.topk_weights, layer=box(0))
    np.testing.assert_array_equal(y, mm.moe(*layer[:4]))
    with pytest.raises(ShapeError, match="layer is 2, wanted 0 to 1"):
        mm.moe(layer.x, stacked, layer.ids, layer.topk_weights, layer=box(2))


def test_a_symbolic_batch_under_vmap_is_refused_in_one_sentence():
    layer = make_layer()
    (batch,) = export.symbolic_shape("b")
    arguments = [
        jax.ShapeDtypeStruct((batch, *value.shape), value.dtype) for value in (layer.x, layer.ids, layer.topk_weights)
    ]
    mapped = jax.vmap(lambda x, ids, topk_weights: mm.moe(x, layer.weights, ids, topk_weights))
    with pytest.raises(MegaMoEError, match="x is mapped by jax.vmap over b elements, wanted a number"):
        export.export(jax.jit(mapped))(*arguments)
