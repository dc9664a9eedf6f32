"""`shared` and `shared_weights`: experts that every token goes through, in the same call, however it is split."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, DTypeError, LayoutError, ShapeError, ShardingError
from tests.support import numpy_model
from tests.support.cases import exhaustive, one_in
from tests.support.compare import bits, difference
from tests.support.cuda_lowering import cuda_text
from tests.support.expert_layer import E, H, I, Layer, assert_matches_model, make_layer, natural_weights, packed_weights
from tests.support.meshes import AUTO, EXPLICIT, MESHES, assert_both_match_model, make_mesh, place, place_all

FACTOR = 2.5
moe_and_load: Any = functools.partial(mm.moe, return_expert_load=True, routed_scaling_factor=FACTOR)


def shared_natural(count: int = 2) -> numpy_model.Experts:
    return numpy_model.Experts(*(leaf[:count] for leaf in natural_weights(seed=7)))


def shared_packed(count: int = 2) -> mm.ExpertWeights:
    return mm.pack_experts(*shared_natural(count))


def scale_of(num_tokens: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(5).random((num_tokens, count), np.float32) - 0.3


def with_shared(layer: Layer, scale: np.ndarray, valid: Any = True, factor: float = FACTOR) -> Layer:
    """The layer with what the model has for it, where shared experts are experts that every valid token names."""
    num_tokens, count = scale.shape
    experts = numpy_model.Experts(
        *(np.concatenate(both) for both in zip(natural_weights(), shared_natural(count), strict=True))
    )
    ids = np.where(np.asarray(layer.ids) < E, layer.ids, -1)
    ids = np.concatenate([ids, np.tile(E + np.arange(count, dtype=np.int32), (num_tokens, 1))], 1)
    ids = np.where(np.broadcast_to(valid, num_tokens)[:, None], ids, -1)
    weights = np.concatenate([np.asarray(layer.topk_weights) * np.float32(factor), scale], 1)
    y, load = numpy_model.moe(np.asarray(layer.x), experts, ids, weights)
    return layer._replace(y=y, load=load[:E])


@pytest.mark.parametrize(
    "function",
    [mm.moe, exhaustive(mm.reference.moe)],
    ids=["moe", "reference"],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("count", [exhaustive(1), 2])
def test_every_token_goes_through_them(function, jit, count):
    layer, scale = make_layer(), scale_of(16, count)
    run: Any = functools.partial(function, return_expert_load=True, routed_scaling_factor=FACTOR)
    run = jax.jit(run) if jit else run
    result = run(*layer[:4], shared=shared_packed(count), shared_weights=jnp.asarray(scale))
    assert_both_match_model(result, with_shared(layer, scale))
    result = run(*layer[:4], shared=shared_packed(count))
    assert_both_match_model(result, with_shared(layer, np.ones_like(scale)))


def test_tokens_without_used_slots_get_them_and_invalid_ones_do_not():
    layer, scale = make_layer(), scale_of(16)
    layer = layer._replace(ids=jnp.full_like(layer.ids, -1))
    options = {"shared": shared_packed(), "shared_weights": jnp.asarray(scale)}
    assert_both_match_model(moe_and_load(*layer[:4], **options), with_shared(layer, scale))
    valid = np.arange(16) < 5
    y, _ = moe_and_load(*layer[:4], **options, num_valid_tokens=jnp.int32(5))
    assert_matches_model(y, with_shared(layer, scale, valid))
    assert not np.asarray(y)[5:].any()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_no_id_of_the_caller_names_a_shared_expert(seed):
    layer, rng = make_layer(), np.random.default_rng(seed)
    ids = rng.integers(E, E + 4, layer.ids.shape).astype(np.int32)
    got = mm.moe(*layer[:2], ids, layer.topk_weights, shared=shared_packed())
    wanted = mm.moe(*layer[:2], jnp.full_like(layer.ids, -1), layer.topk_weights, shared=shared_packed())
    np.testing.assert_array_equal(bits(got), bits(wanted))


def test_they_do_not_move_the_routed_part():
    """Shared experts whose factor is zero: the same bits as without them, but for the sum's zeros."""
    layer = make_layer()
    y = mm.moe(*layer[:4], shared=shared_packed(), shared_weights=jnp.zeros((16, 2)))
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(mm.moe(*layer[:4]), np.float32))


def test_layers_are_stacked_and_scanned():
    layers = [make_layer(), make_layer(seed=1)]
    weights = mm.stack_experts([layer.weights for layer in layers])
    shared = mm.stack_experts([shared_packed(), packed_shared_of(natural_weights(seed=1))])
    for index, own in enumerate((shared_packed(), packed_shared_of(natural_weights(seed=1)))):
        one = mm.moe(*layers[0][:1], layers[index].weights, *layers[0][2:4], shared=own)
        for at in (index, jnp.int32(index)):
            y = mm.moe(layers[0].x, weights, *layers[0][2:4], layer=at, shared=shared)
            np.testing.assert_array_equal(bits(y), bits(one))

    def step(carry: None, index: jax.Array) -> tuple[None, jax.Array]:
        return carry, mm.moe(layers[0].x, weights, *layers[0][2:4], layer=index, shared=shared)

    scanned = jax.jit(lambda: jax.lax.scan(step, None, jnp.arange(2))[1])()
    np.testing.assert_array_equal(bits(scanned[1]), bits(one))


def packed_shared_of(natural: numpy_model.Experts, count: int = 2) -> mm.ExpertWeights:
    return mm.pack_experts(*(leaf[:count] for leaf in natural))


def test_vmap_over_tokens():
    layer, scale = make_layer(), scale_of(16)
    x, ids, topk_weights, factors = (
        jnp.reshape(v, (4, 4, -1)) for v in (layer.x, layer.ids, layer.topk_weights, scale)
    )
    run = jax.vmap(
        lambda x, ids, w, s: moe_and_load(x, layer.weights, ids, w, shared=shared_packed(), shared_weights=s)
    )
    y, load = jax.jit(run)(x, ids, topk_weights, factors)
    wanted = with_shared(layer, scale)
    assert_matches_model(y, wanted)
    np.testing.assert_array_equal(load.sum(0), wanted.load)
    with pytest.raises(NotImplementedError, match="shared is mapped by jax.vmap"):
        jax.vmap(lambda s: mm.moe(*layer[:4], shared=s))(jax.tree.map(lambda leaf: leaf[None], shared_packed()))


def test_export_and_a_transfer_guard():
    layer, scale = make_layer(), jax.device_put(scale_of(16))
    arguments, shared = jax.device_put(layer[:4]), shared_packed()
    exported = export.export(jax.jit(moe_and_load), disabled_checks=mm.DISABLE_JAX_EXPORT_CHECKS)(
        *arguments, shared=shared, shared_weights=scale
    )
    result = export.deserialize(exported.serialize()).call(*arguments, shared=shared, shared_weights=scale)
    assert_both_match_model(result, with_shared(layer, np.asarray(scale)))
    with jax.transfer_guard("disallow"):
        y = mm.moe(*arguments, shared=shared)
    assert_matches_model(y, with_shared(layer, np.ones((16, 2), np.float32), factor=1.0))


# Where one kernel cannot serve both.


def formats_apart(num_tokens: int = 16) -> tuple[Layer, mm.ExpertWeights, np.ndarray]:
    """The layer, shared experts in MXFP4, and the sum of the two models."""
    layer, rng = make_layer(num_tokens), np.random.default_rng(3)
    octets = (rng.integers(0, 256, shape, np.uint8) for shape in ((1, 2 * I, H // 2), (1, H, I // 2)))
    (gate_up, down), powers = (
        octets,
        [rng.integers(116, 120, (1, n, k // 32), np.uint8) for n, k in ((2 * I, H), (H, I))],
    )
    natural = numpy_model.Experts(gate_up, powers[0], down, powers[1])
    own, _ = numpy_model.moe(
        np.asarray(layer.x), natural, np.zeros((num_tokens, 1), np.int32), np.ones((num_tokens, 1), np.float32)
    )
    y = np.asarray(layer.y, np.float32) + np.asarray(own, np.float32)
    return layer, mm.pack_experts(*natural), y


@pytest.mark.parametrize(
    "function",
    [mm.moe, exhaustive(mm.reference.moe)],
    ids=["moe", "reference"],
)
def test_another_format_is_a_call_of_its_own(function):
    layer, shared, wanted = formats_apart()
    y, load = jax.jit(functools.partial(function, return_expert_load=True))(*layer[:4], shared=shared)
    assert difference(np.asarray(y), wanted) < 1e-5
    np.testing.assert_array_equal(load, layer.load)


def test_more_slots_than_one_kernel_serves():
    layer, rng = make_layer(), np.random.default_rng(2)
    ids = rng.integers(0, E, (16, 31)).astype(np.int32)
    weights = rng.random(ids.shape, np.float32)
    y, load = jax.jit(moe_and_load)(*layer[:2], ids, weights, shared=shared_packed())
    wanted = with_shared(layer._replace(ids=ids, topk_weights=weights), np.ones((16, 2), np.float32))
    assert difference(np.asarray(y), wanted.y) < 1e-5
    np.testing.assert_array_equal(load, wanted.load)


def test_one_kernel_where_it_serves_both(built):
    layer = make_layer()
    assert cuda_text(lambda *a: mm.moe(*a, shared=shared_packed()), *layer[:4]).count("custom_call @jax_megamoe") == 1
    apart = formats_apart()
    assert cuda_text(lambda *a: mm.moe(*a, shared=apart[1]), *layer[:4]).count("custom_call @jax_megamoe") == 2


# On meshes.


@pytest.mark.parametrize(
    ("kind", "jit", "function"),
    [
        (AUTO, True, mm.moe),
        (AUTO, False, mm.moe),
        (EXPLICIT, True, mm.moe),
        exhaustive(EXPLICIT, False, mm.moe),
        ((AUTO, EXPLICIT), True, mm.moe),
        exhaustive(AUTO, True, mm.reference.moe),
        (EXPLICIT, True, mm.reference.moe),
    ],
    ids=[
        "auto-jit",
        "auto-eager",
        "explicit-jit",
        "explicit-eager",
        "mixed-jit",
        "auto-reference",
        "explicit-reference",
    ],
)
@pytest.mark.parametrize("sizes", ["data x expert", exhaustive("expert")])
def test_global_view(each_platform, kind, jit, function, sizes):
    if isinstance(kind, tuple) and sizes == "expert":
        pytest.skip("two kinds of axes want two axes")
    mesh, layer, scale = make_mesh(MESHES[sizes], kind), make_layer(), scale_of(16)
    arguments = place_all(mesh, layer)
    options = {
        "shared": place(mesh, shared_packed()),
        "shared_weights": place(mesh, scale, ("data", "expert")),
        "num_valid_tokens": jnp.int32(11),
    }
    run = functools.partial(function, return_expert_load=True, routed_scaling_factor=FACTOR)
    result = (jax.jit(run) if jit else run)(*arguments, **options)
    assert_both_match_model(result, with_shared(layer, scale, np.arange(16) < 11))
    if kind == EXPLICIT:
        assert jax.typeof(result[0]) == jax.typeof(arguments[0])


@pytest.mark.parametrize("num_tokens", [1, 13])
def test_tokens_that_the_axes_do_not_divide(each_platform, num_tokens):
    mesh, layer, scale = make_mesh(MESHES["expert"], AUTO), make_layer(num_tokens), scale_of(num_tokens)
    arguments = place_all(mesh, layer, tokens=None)
    shared = place(mesh, shared_packed())
    result = jax.jit(moe_and_load)(*arguments, shared=shared, shared_weights=place(mesh, scale))
    assert_both_match_model(result, with_shared(layer, scale))


@pytest.mark.parametrize(
    ("experts", "tokens"), one_in(2, ["expert", ("data", "expert")], [(), ("data",), ("expert",), ("data", "expert")])
)
@pytest.mark.parametrize("implementation", [None, exhaustive("collective")])
def test_tokens_split_over_some_axes(each_platform, tokens, implementation, experts):
    """Each token's shared part is computed once, also where several ranks have the token."""
    mesh, layer, scale = make_mesh(MESHES["data x expert"], AUTO), make_layer(), scale_of(16)
    arguments = place_all(mesh, layer, tokens=tokens, experts=experts)
    run = functools.partial(moe_and_load, expert_axis=experts, token_axes=tokens, implementation=implementation)
    result = jax.jit(run)(*arguments, shared=place(mesh, shared_packed()), shared_weights=place(mesh, scale, tokens))
    assert_both_match_model(result, with_shared(layer, scale))


@pytest.mark.parametrize(
    ("function", "check_vma", "tokens"),
    one_in(
        3,
        {"moe": mm.moe, "reference": mm.reference.moe},
        {"marks": True, "no marks": False},
        [("data", "expert"), ("data",)],
    ),
)
def test_shard_map(each_platform, check_vma, function, tokens):
    mesh, layer, scale = make_mesh(MESHES["data x expert"], AUTO), make_layer(), scale_of(16)
    run = functools.partial(
        function, return_expert_load=True, routed_scaling_factor=FACTOR, token_axes=("data", *tokens[1:])
    )
    mapped = jax.shard_map(
        lambda x, w, ids, weights, shared, scale: run(x, w, ids, weights, shared=shared, shared_weights=scale),
        mesh=mesh,
        in_specs=(P(tokens), P("expert"), P(tokens), P(tokens), P(), P(tokens)),
        out_specs=(P(tokens), P("expert")),
        check_vma=check_vma,
    )
    result = jax.jit(mapped)(*layer[:4], shared_packed(), scale)
    assert_both_match_model(result, with_shared(layer, scale))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_another_format_on_a_mesh(each_platform, kind):
    mesh, (layer, shared, wanted) = make_mesh(MESHES["data x expert"], kind), formats_apart()
    y, load = jax.jit(functools.partial(mm.moe, return_expert_load=True))(
        *place_all(mesh, layer), shared=place(mesh, shared)
    )
    assert difference(np.asarray(y), wanted) < 1e-5
    np.testing.assert_array_equal(load, layer.load)


def test_nan_that_is_not_used_is_not_found():
    """jax_debug_nans looks at what comes out of each compiled part."""
    layer, apart = make_layer(), formats_apart()[1]
    scale = jnp.asarray(scale_of(16)).at[5:].set(jnp.nan)
    first = scale[:, :1]
    with jax.debug_nans(True):
        y = mm.moe(*layer[:4], shared=shared_packed(), shared_weights=scale, num_valid_tokens=5)
        mm.moe(*layer[:4], shared=apart, shared_weights=first, num_valid_tokens=5)
    assert np.isfinite(np.asarray(y, np.float32)).all()
    y = mm.moe(*layer[:4], shared=shared_packed(), shared_weights=scale)
    assert np.isnan(np.asarray(y, np.float32)[5:]).all()


def test_a_transfer_guard_where_there_are_two_calls():
    arguments, shared = jax.device_put(make_layer()[:4]), jax.device_put(formats_apart()[1])
    count = jax.device_put(jnp.int32(3))
    with jax.transfer_guard("disallow"):
        mm.moe(*arguments, shared=shared, num_valid_tokens=count)
        mm.reference.moe(*arguments, shared=shared)


def test_shared_experts_that_differ_from_device_to_device_are_refused():
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer()
    split = P("expert")

    def own(x: Any, weights: Any, ids: Any, topk_weights: Any, shared: Any) -> Any:
        return mm.moe(x, weights, ids, topk_weights, shared=dataclasses.replace(shared, num_experts=1))

    mapped = jax.shard_map(own, mesh=mesh, in_specs=(split, split, split, split, split), out_specs=split)
    with pytest.raises(ShardingError, match="shared.gate_up is split over 'expert', wanted all shared experts on each"):
        mapped(*layer[:4], packed_weights())


def test_arrays_that_are_split_over_an_automatic_axis_are_refused():
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    with pytest.raises(ShardingError, match="shared.gate_up is split over 'data', wanted all shared experts on each"):
        mm.moe(*place_all(mesh, layer), shared=place(mesh, shared_packed(), "data"))


def test_split_shared_experts_are_refused():
    mesh, layer = make_mesh(MESHES["data x expert"], EXPLICIT), make_layer()
    with pytest.raises(ShardingError, match="shared.gate_up is split over 'data', wanted all shared experts on each"):
        mm.moe(*place_all(mesh, layer), shared=place(mesh, shared_packed(), "data"))


# What is refused.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shared_weights": jnp.ones((16, 2))}, ArgumentError, "shared_weights is given and shared is None"),
        ({"shared": natural_weights()}, LayoutError, "shared is a"),
        (
            {"shared": shared_packed(), "shared_weights": jnp.ones((16, 1))},
            ShapeError,
            r"shared_weights has shape \(16, 1\), wanted \(16, 2\) for x of shape",
        ),
        (
            {"shared": shared_packed(), "shared_weights": jnp.ones((16, 2), jnp.bfloat16)},
            DTypeError,
            "shared_weights has dtype bfloat16, wanted float32: cast it",
        ),
        ({"shared": shared_packed(), "shared_weights": [1.0]}, DTypeError, "shared_weights is a list"),
        (
            {"shared": mm.stack_experts([shared_packed()])},
            ShapeError,
            "shared is a stack of 1 and weights of one layer, not stacked, wanted both alike",
        ),
        (
            {"shared": mm.quantize_experts(*(jnp.ones(s) for s in ((1, 256, H), (1, 256, H), (1, H, 256))))},
            ShapeError,
            r"shared has hidden and intermediate size \(256, 256\), wanted \(256, 128\) like weights",
        ),
        (
            {"shared": dataclasses.replace(jax.tree.map(lambda leaf: leaf[:0], shared_packed()), num_experts=0)},
            ShapeError,
            "shared has 0 experts, wanted 1 to 32: leave it out",
        ),
        (
            {"shared": jax.tree.map(lambda leaf: leaf[:1], shared_packed())},
            ShapeError,
            "shared holds 1 of 2 experts, wanted all of them on each device",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(options, error, message):
    for function in (mm.moe, mm.reference.moe):
        with pytest.raises(error, match=message):
            function(*make_layer()[:4], **options)


def test_host_memory_is_refused():
    shared = jax.device_put(shared_packed(), jax.memory.Space.Host)
    with pytest.raises(ShardingError, match="shared.gate_up is in host memory"):
        mm.moe(*make_layer()[:4], shared=shared)
