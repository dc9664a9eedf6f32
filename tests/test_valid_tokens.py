"""`num_valid_tokens`: the tokens behind have no used slots, whatever they hold, however the call is split."""

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
from jax_megamoe.errors import DTypeError, ShapeError, ShardingError
from tests.support import numpy_model
from tests.support.cases import exhaustive, one_in
from tests.support.compare import bits
from tests.support.cuda_lowering import cuda_text
from tests.support.expert_layer import E, H, Layer, assert_matches_model, make_layer, natural_weights, packed_weights
from tests.support.meshes import AUTO, EXPLICIT, MESHES, assert_both_match_model, make_mesh, place, place_all

moe_and_load: Any = functools.partial(mm.moe, return_expert_load=True)


def limit(layer: Layer, *, valid: Any) -> Layer:
    """The layer with what the model has for it where only the tokens marked in bool[T] are valid."""
    ids = np.where(np.asarray(valid)[:, None], layer.ids, -1)
    y, load = numpy_model.moe(np.asarray(layer.x), natural_weights(), ids, np.asarray(layer.topk_weights))
    assert not y[~np.asarray(valid)].any()
    return layer._replace(y=y, load=load)


def first(count: int, num_tokens: int = 16) -> np.ndarray:
    return np.arange(num_tokens) < count


@pytest.mark.parametrize(
    ("function", "jit", "count"),
    one_in(
        2,
        {"moe": mm.moe, "reference": mm.reference.moe},
        {"eager": False, "jit": True},
        {repr(count): count for count in (0, 5, np.int64(5), jnp.uint32(5), 16, np.uint8(16), jnp.int8(0))},
    ),
)
def test_tokens_behind_are_zeros_and_not_counted(function, jit, count):
    layer = limit(make_layer(), valid=first(int(count)))
    run: Any = functools.partial(function, return_expert_load=True)
    if jit:
        run = jax.jit(run)
    assert_both_match_model(run(*layer[:4], num_valid_tokens=count), layer)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(-3, 19))
def test_what_the_tokens_behind_hold_has_no_influence(seed, count):
    layer, rng = make_layer(), np.random.default_rng(seed)
    behind = ~first(count)
    x, ids, topk_weights = (np.array(value) for value in (layer.x, layer.ids, layer.topk_weights))
    x[behind] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 0], (behind.sum(), H))
    ids[behind] = rng.integers(-(2**31), 2**31, ids[behind].shape)
    topk_weights[behind] = np.nan
    # A count outside of [0, T] is clamped where it is a jax array.
    y, load = moe_and_load(x, layer.weights, ids, topk_weights, num_valid_tokens=jnp.int32(count))
    wanted, wanted_load = moe_and_load(*layer[:2], np.where(behind[:, None], -1, layer.ids), layer.topk_weights)
    np.testing.assert_array_equal(bits(y), bits(wanted))
    np.testing.assert_array_equal(load, wanted_load)


def test_one_program_serves_all_numbers():
    layer = make_layer()
    run: Any = jax.jit(lambda *a, **options: moe_and_load(*a, **options))
    for count in range(4):
        assert_both_match_model(run(*layer[:4], num_valid_tokens=jnp.int32(count)), limit(layer, valid=first(count)))
    assert run._cache_size() == 1


def test_counts_the_tokens_of_all_leading_dimensions():
    layer = make_layer()
    x, ids, topk_weights = (jnp.reshape(value, (2, 2, 4, -1)) for value in (layer.x, layer.ids, layer.topk_weights))
    y = mm.moe(x, layer.weights, ids, topk_weights, num_valid_tokens=7)
    assert_matches_model(y, limit(layer, valid=first(7)))
    one = make_layer(1)
    y = mm.moe(one.x[0], one.weights, one.ids[0], one.topk_weights[0], num_valid_tokens=0)
    assert y.shape == (H,) and not np.asarray(y).any()


def test_no_tokens():
    layer = make_layer(0)
    y, load = moe_and_load(*layer[:4], num_valid_tokens=jnp.int32(0))
    assert y.shape == (0, H) and not np.asarray(load).any()


def test_vmap_counts_in_each_element():
    layer = make_layer()
    x, ids, topk_weights = (value.reshape(4, 4, -1) for value in (layer.x, layer.ids, layer.topk_weights))
    counts = jnp.array([0, 4, 1, 9])
    f = jax.vmap(lambda x, ids, w, count: moe_and_load(x, layer.weights, ids, w, num_valid_tokens=count))
    y, load = jax.jit(f)(x, ids, topk_weights, counts)
    wanted = limit(layer, valid=(np.arange(4) < np.asarray(counts)[:, None]).ravel())
    assert_matches_model(y, wanted)
    assert load.shape == (4, E)
    np.testing.assert_array_equal(load.sum(0), wanted.load)
    same = jax.vmap(lambda x, ids, w: mm.moe(x, layer.weights, ids, w, num_valid_tokens=2))(x, ids, topk_weights)
    assert_matches_model(same, limit(layer, valid=np.tile(first(2, 4), 4)))


def test_scan_and_loop_over_numbers():
    layer = make_layer()

    def step(carry: None, count: jax.Array) -> tuple[None, jax.Array]:
        return carry, mm.moe(*layer[:4], num_valid_tokens=count)

    for count, y in enumerate(jax.lax.scan(step, None, jnp.arange(3))[1]):
        assert_matches_model(y, limit(layer, valid=first(count)))


def test_export():
    layer = make_layer()
    exported = export.export(jax.jit(moe_and_load))(*layer[:4], num_valid_tokens=jnp.int32(3))
    read = export.deserialize(exported.serialize())
    assert_both_match_model(read.call(*layer[:4], num_valid_tokens=jnp.int32(9)), limit(layer, valid=first(9)))


def test_nothing_is_added_without_it_and_one_selection_with_it(built):
    layer = make_layer()
    plain = cuda_text(mm.moe, *layer[:4])
    limited = cuda_text(lambda count, *a: mm.moe(*a, num_valid_tokens=count), jnp.int32(3), *layer[:4])
    assert "stablehlo.select" not in plain and limited.count("stablehlo.select") == 1


def test_a_transfer_guard_has_nothing_to_say():
    layer, count = make_layer(), jax.device_put(jnp.int32(3))
    arguments = jax.device_put(layer[:4])
    with jax.transfer_guard("disallow"):
        y = mm.moe(*arguments, num_valid_tokens=count)
        fixed = mm.moe(*arguments, num_valid_tokens=3)
    assert_matches_model(y, limit(layer, valid=first(3)))
    np.testing.assert_array_equal(bits(y), bits(fixed))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ShapeError, "num_valid_tokens is -1, wanted 0 to 16, the tokens of x: pass how many of them are valid."),
        (np.int64(17), ShapeError, "num_valid_tokens is 17, wanted 0 to 16"),
        (jnp.zeros(1, jnp.int32), ShapeError, r"num_valid_tokens has shape \(1,\), wanted a scalar: "),
        (jnp.float32(3), DTypeError, "num_valid_tokens has dtype float32, wanted an integer type: "),
        (np.bool_(True), DTypeError, "num_valid_tokens has dtype bool, wanted an integer type: "),
        (True, DTypeError, "num_valid_tokens is True, wanted an integer type: "),
        (3.0, DTypeError, "num_valid_tokens is a float, wanted an array: "),
        ([3], DTypeError, "num_valid_tokens is a list, wanted an array: "),
    ],
)
def test_what_is_no_number_of_tokens(value, error, message):
    for function in (mm.moe, mm.reference.moe):
        with pytest.raises(error, match=message):
            function(*make_layer()[:4], num_valid_tokens=value)


def test_host_memory_is_refused():
    count = jax.device_put(jnp.int32(3), jax.memory.Space.Host)
    with pytest.raises(ShardingError, match="num_valid_tokens is in host memory"):
        mm.moe(*make_layer()[:4], num_valid_tokens=count)


# On meshes.


@pytest.mark.parametrize(
    ("kind", "jit", "function"),
    [
        (AUTO, True, mm.moe),
        (AUTO, False, mm.moe),
        (EXPLICIT, True, mm.moe),
        exhaustive((AUTO, EXPLICIT), True, mm.moe),
        exhaustive(AUTO, True, mm.reference.moe),
        (EXPLICIT, False, mm.reference.moe),
    ],
    ids=["auto-jit", "auto-eager", "explicit-jit", "mixed-jit", "auto-jit-reference", "explicit-eager-reference"],
)
def test_global_view(each_platform, kind, jit, function):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer()
    arguments = place_all(mesh, layer)
    run = functools.partial(function, return_expert_load=True)
    for count in (5, jnp.int32(11)):
        result = (jax.jit(run) if jit else run)(*arguments, num_valid_tokens=count)
        assert_both_match_model(result, limit(layer, valid=first(int(count))))
        if kind == EXPLICIT:
            assert jax.typeof(result[0]) == jax.typeof(arguments[0])


@pytest.mark.parametrize("num_tokens", [1, exhaustive(5), 13])
def test_tokens_that_the_axes_do_not_divide(each_platform, num_tokens):
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer(num_tokens)
    arguments = place_all(mesh, layer, tokens=None)
    for count in (0, num_tokens - 1, num_tokens):
        result = jax.jit(moe_and_load)(*arguments, num_valid_tokens=jnp.int32(count))
        assert_both_match_model(result, limit(layer, valid=first(count, num_tokens)))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_vmap_over_a_dimension_that_a_mesh_splits(each_platform, kind):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer()
    weights = place(mesh, layer.weights, "expert")
    x, ids, topk_weights = (
        place(mesh, np.asarray(value).reshape(2, 8, -1), "data", "expert")
        for value in (layer.x, layer.ids, layer.topk_weights)
    )
    counts = place(mesh, np.array([3, 8]), "data")
    f = jax.vmap(lambda x, ids, w, count: mm.moe(x, weights, ids, w, num_valid_tokens=count))
    y = jax.jit(f)(x, ids, topk_weights, counts)
    assert_matches_model(y, limit(layer, valid=(np.arange(8) < np.array([[3], [8]])).ravel()))


def test_explicit_axes_over_two_dimensions(each_platform):
    mesh, layer = make_mesh(MESHES["data x expert"], EXPLICIT), make_layer()
    flat = place_all(mesh, layer)
    x, ids, topk_weights = (value.reshape(4, 4, -1) for value in (layer.x, layer.ids, layer.topk_weights))
    x, ids, topk_weights = (
        jax.device_put(v, jax.NamedSharding(mesh, P("data", "expert"))) for v in (x, ids, topk_weights)
    )
    y = jax.jit(mm.moe)(x, flat[1], ids, topk_weights, num_valid_tokens=jnp.int32(6))
    assert jax.typeof(y) == jax.typeof(x)
    assert_matches_model(jnp.asarray(np.asarray(y)), limit(layer, valid=first(6)))


@pytest.mark.parametrize(
    ("check_vma", "function"),
    [(True, mm.moe), (False, mm.moe), (True, mm.reference.moe)],
    ids=["marks", "no marks", "reference"],
)
def test_each_device_counts_its_own_in_shard_map(each_platform, check_vma, function):
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer()
    num_ranks = mesh.size
    per_rank = 16 // num_ranks
    spec = P("expert")

    def local(x: Any, weights: Any, ids: Any, topk_weights: Any, counts: Any) -> Any:
        return function(x, weights, ids, topk_weights, num_valid_tokens=counts[0], return_expert_load=True)

    f = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 5, out_specs=(spec, spec), check_vma=check_vma))
    counts = jnp.arange(num_ranks) % (per_rank + 1)
    valid = (np.arange(per_rank) < np.asarray(counts)[:, None]).ravel()
    assert_both_match_model(f(*place_all(mesh, layer), counts), limit(layer, valid=valid))

    # The first of all tokens, said to every device in its own terms.
    def of_all(x: Any, weights: Any, ids: Any, topk_weights: Any, count: Any) -> Any:
        own = count - jax.lax.axis_index("expert") * len(x)
        return function(x, weights, ids, topk_weights, num_valid_tokens=own, return_expert_load=True)

    f = jax.jit(
        jax.shard_map(of_all, mesh=mesh, in_specs=(*(spec,) * 4, P()), out_specs=(spec, spec), check_vma=check_vma)
    )
    assert_both_match_model(f(*place_all(mesh, layer), jnp.int32(7)), limit(layer, valid=first(7)))


def test_some_axes_are_manual(each_platform):
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()

    def local(x: Any, weights: Any, ids: Any, topk_weights: Any, count: Any) -> Any:
        return mm.moe(x, weights, ids, topk_weights, num_valid_tokens=count)

    f = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("data"), P(), P("data"), P("data"), P()),
        out_specs=P("data"),
        axis_names={"data"},
    )
    x, _, ids, topk_weights = place_all(mesh, layer, tokens="data")
    y = jax.jit(f)(x, packed_weights(), ids, topk_weights, jnp.int32(3))
    num_data = mesh.shape["data"]
    assert_matches_model(y, limit(layer, valid=np.tile(first(3, 16 // num_data), num_data)))
