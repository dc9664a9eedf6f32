"""Redundant experts: maps between logical and physical experts, and weights that have the replicas."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, DTypeError, ShapeError, ShardingError
from tests.support.cases import one_in
from tests.support.compare import bits
from tests.support.expert_layer import E, make_layer, packed_weights
from tests.support.meshes import (
    AUTO,
    EXPLICIT,
    KINDS,
    MESHES,
    assert_both_match_model,
    make_mesh,
    moe_and_load,
    place,
    place_all,
)

# 16 physical experts of 8 logical ones: of two there are four, of one three, of the others one each.
EXPERT_IDS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 2, 2, 5, 2, 5, 5, 7, 7], np.int32)


def model(ids: Any, expert_ids: Any, first_token: int = 0) -> np.ndarray:
    """Token by token and slot by slot."""
    replicas = {expert: np.flatnonzero(expert_ids == expert) for expert in set(np.asarray(expert_ids).tolist())}
    rows = np.asarray(ids).reshape(-1, np.shape(ids)[-1])
    found = [
        [replicas[e][(t + first_token) % len(replicas[e])] if e in replicas else -1 for e in row]
        for t, row in enumerate(rows.tolist())
    ]
    return np.array(found, np.int32).reshape(np.shape(ids))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 999), first_token=st.integers(0, 2**31 - 1))
def test_to_physical_is_the_model(data, seed, first_token):
    rng, num_experts = np.random.default_rng(seed), 6
    expert_ids = rng.permutation(np.concatenate([np.arange(num_experts), rng.integers(0, num_experts, seed % 9)]))
    ids = rng.integers(-2, num_experts + 2, data.draw(st.sampled_from([(0, 3), (7, 3), (2, 5, 1), (4,)])))
    counts = np.bincount(expert_ids, minlength=num_experts)
    physical_ids, num_replicas = mm.replica_map(expert_ids, num_experts, counts.max() + seed % 2)
    np.testing.assert_array_equal(num_replicas, counts)
    found = mm.to_physical(ids, physical_ids, num_replicas, first_token=first_token)
    assert found.dtype == jnp.int32
    known = np.where((ids >= 0) & (ids < num_experts), ids, -1)
    np.testing.assert_array_equal(found, model(known, expert_ids, first_token))
    # Each stands for the expert that was asked for, whatever its number.
    np.testing.assert_array_equal(np.where(found >= 0, expert_ids[found], -1), known)


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(0, 40), first_token=st.integers(0, 50), num_replicas=st.integers(1, 5))
def test_replicas_of_an_expert_that_all_have_differ_by_one_at_most(num_tokens, first_token, num_replicas):
    expert_ids = np.array([1, 0, *[2] * num_replicas])
    ids = np.tile(np.array([2, 0], np.int32), (num_tokens, 1))
    found = mm.to_physical(ids, *mm.replica_map(expert_ids, 3, 5), first_token=first_token)
    load = np.bincount(np.asarray(found).ravel(), minlength=len(expert_ids))
    assert load[2:].max() - load[2:].min() <= 1 and load[1] == num_tokens
    # Steps of one token each take turns as well.
    one = np.array([[2, 0]], np.int32)
    steps = [mm.to_physical(one, *mm.replica_map(expert_ids, 3, 5), first_token=t)[0, 0] for t in range(num_replicas)]
    assert sorted(map(int, steps)) == list(range(2, 2 + num_replicas))


def test_a_layer_of_physical_experts_is_that_of_logical_ones_bit_by_bit():
    layer = make_layer()
    physical_ids, num_replicas = mm.replica_map(EXPERT_IDS, E, 4)

    @jax.jit
    def run(weights: mm.ExpertWeights, physical_ids: Any, num_replicas: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        ids = mm.to_physical(layer.ids, physical_ids, num_replicas)
        y, load = mm.moe(layer.x, weights, ids, layer.topk_weights, return_expert_load=True)
        return y, load, mm.logical_load(load, physical_ids, num_replicas)

    y, load, folded = run(mm.take_experts(packed_weights(), EXPERT_IDS), physical_ids, num_replicas)
    np.testing.assert_array_equal(bits(y), bits(mm.moe(*layer[:4])))
    assert load.shape == (16,) and load[8:].any()
    np.testing.assert_array_equal(folded, layer.load)
    # Another map is other arguments of the same program.
    other = np.roll(EXPERT_IDS, 3)
    y, _, folded = run(mm.take_experts(packed_weights(), other), *mm.replica_map(other, E, 4))
    np.testing.assert_array_equal(bits(y), bits(mm.moe(*layer[:4])))
    np.testing.assert_array_equal(folded, layer.load)
    assert run._cache_size() == 1  # type: ignore[attr-defined]


def test_an_expert_without_replicas_leaves_slots_unused():
    table, counts = jnp.array([[0, 1], [7, 7], [2, -5]]), jnp.array([9, 0, 1])
    ids = jnp.array([[0, 1, 2], [0, 2, -1], [0, 3, 2**31 - 1]])
    found = mm.to_physical(ids, table, counts)
    np.testing.assert_array_equal(found, [[0, -1, 2], [1, 2, -1], [0, -1, -1]])
    np.testing.assert_array_equal(mm.logical_load(jnp.array([5, 6, 7]), table, counts), [11, 0, 7])


def test_maps_of_experts_that_are_not_there():
    physical_ids, num_replicas = mm.replica_map(np.array([3, -1, 0, 3, 9, 3]), 4, 2)
    np.testing.assert_array_equal(physical_ids, [[2, -1], [-1, -1], [-1, -1], [0, 3]])
    np.testing.assert_array_equal(num_replicas, [1, 0, 0, 2])
    physical_ids, num_replicas = mm.replica_map(np.zeros(0, np.int32), 2, 1)
    assert physical_ids.tolist() == [[-1], [-1]] and num_replicas.tolist() == [0, 0]


def test_wide_integers_of_numpy_keep_their_meaning():
    table, counts = np.array([[1], [0]]), np.array([1, 1])
    ids = np.array([[2**32, 1, 2**32 + 1, -(2**32)]])
    np.testing.assert_array_equal(mm.to_physical(ids, table, counts), [[-1, 0, -1, -1]])


def test_loads_of_many_layers_and_steps():
    load = np.arange(2 * 3 * 16).reshape(2, 3, 16)
    folded = mm.logical_load(load, *mm.replica_map(EXPERT_IDS, E, 4))
    wanted = np.stack([load[..., expert == EXPERT_IDS].sum(-1) for expert in range(E)], axis=-1)
    np.testing.assert_array_equal(folded, wanted)


def test_vmap_and_scan():
    ids = np.random.default_rng(0).integers(-1, E, (4, 5, 2))
    table, counts = mm.replica_map(EXPERT_IDS, E, 4)
    run = jax.vmap(lambda ids, first: mm.to_physical(ids, table, counts, first_token=first))
    np.testing.assert_array_equal(run(ids, jnp.arange(4) * 5), model(ids, EXPERT_IDS))
    scanned = jax.lax.scan(lambda c, ids: (c, mm.to_physical(ids, table, counts, first_token=c)), jnp.int32(1), ids)[1]
    np.testing.assert_array_equal(scanned, [model(element, EXPERT_IDS, 1) for element in ids])


def test_a_transfer_guard_has_nothing_to_say():
    ids = jax.device_put(jnp.asarray([[0, 5]]))
    table = jax.device_put(mm.replica_map(EXPERT_IDS, E, 4))
    with jax.transfer_guard("disallow"):
        mm.logical_load(jax.device_put(np.zeros(16, np.int32)), *table)
        found = mm.to_physical(ids, *table, first_token=1)
    np.testing.assert_array_equal(found, [[0, 10]])


TABLE, COUNTS = np.zeros((3, 2), np.int32), np.ones(3, np.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.int32(1), TABLE, COUNTS), ShapeError, r"ids is a scalar, wanted \[..., k\]: "),
        ((np.zeros((2, 2)), TABLE, COUNTS), DTypeError, "ids has dtype float64, wanted an integer type: "),
        (([[1]], TABLE, COUNTS), DTypeError, "ids is a list, wanted an array of int32: "),
        ((COUNTS, TABLE[0], COUNTS), ShapeError, r"physical_ids has shape \(2,\), wanted \[E, R\]: "),
        ((COUNTS, TABLE[:, :0], COUNTS), ShapeError, r"physical_ids has shape \(3, 0\), wanted \[E, R\]: "),
        ((COUNTS, TABLE, COUNTS[:2]), ShapeError, r"num_replicas has shape \(2,\), wanted \(3,\) like the experts"),
        ((COUNTS, TABLE, np.array([1, 0, 3])), ArgumentError, "num_replicas is 0 for expert 1, wanted 1 to 2, "),
    ],
)
def test_maps_that_cannot_be_used(arguments, error, message):
    with pytest.raises(error, match=message):
        mm.to_physical(*arguments)
    if "ids is" not in message and "ids has dtype" not in message:
        with pytest.raises(error, match=message):
            mm.logical_load(*arguments)


def test_arguments_of_the_maps():
    with pytest.raises(ShapeError, match=r"first_token has shape \(2,\), wanted a scalar: "):
        mm.to_physical(COUNTS, TABLE, COUNTS, first_token=jnp.zeros(2, jnp.int32))
    with pytest.raises(DTypeError, match="first_token is a float"):
        mm.to_physical(COUNTS, TABLE, COUNTS, first_token=1.0)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="load is a scalar"):
        mm.logical_load(np.int32(1), TABLE, COUNTS)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"expert_ids has shape \(3, 2\), wanted \[P\]: "):
        mm.replica_map(TABLE, 3, 2)
    with pytest.raises(ArgumentError, match="max_replicas is 0, wanted a positive int known while tracing: "):
        mm.replica_map(COUNTS, 3, 0)
    for load in (jnp.zeros(0, jnp.int32), np.zeros((2, 0), np.int32)):
        with pytest.raises(ShapeError, match=r"load has shape .*0.*, wanted \[..., P\] with P > 0: pass the load"):
            mm.logical_load(load, TABLE, COUNTS)
    with pytest.raises(ArgumentError, match="max_replicas is 2147483648, wanted at most 2147483647, the last int32"):
        mm.replica_map(COUNTS, 8, 2**31)
    with pytest.raises(ArgumentError, match="num_experts is 1099511627776, wanted at most 2147483647"):
        mm.replica_map(COUNTS, 2**40, 4)


# On meshes.


@pytest.mark.parametrize(
    ("kind", "sizes"), one_in(2, KINDS, {name: MESHES[name] for name in ("expert", "data x expert")})
)
def test_layer_on_a_mesh(each_platform, sizes, kind):
    mesh, layer = make_mesh(sizes, kind), make_layer()
    x, weights, ids, topk_weights = place_all(mesh, layer)
    table, counts = (place(mesh, value) for value in mm.replica_map(EXPERT_IDS, E, 4))
    taken = mm.take_experts(weights, EXPERT_IDS)
    physical = jax.jit(mm.to_physical)(ids, table, counts)
    np.testing.assert_array_equal(physical, model(np.where(np.asarray(ids) < E, ids, -1), EXPERT_IDS))
    y, load = jax.jit(moe_and_load)(x, taken, physical, topk_weights)
    folded = jax.jit(mm.logical_load)(load, table, counts)
    assert_both_match_model((y, folded), layer)
    if kind == EXPLICIT:
        assert jax.typeof(physical) == jax.typeof(ids)


@pytest.mark.parametrize("check_vma", [True, False])
def test_layer_inside_shard_map(each_platform, check_vma):
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer()
    table, counts = mm.replica_map(EXPERT_IDS, E, 4)
    spec = P("expert")

    def local(x: Any, weights: Any, ids: Any, topk_weights: Any, table: Any, counts: Any) -> Any:
        first = jax.lax.axis_index("expert") * len(ids)
        physical = mm.to_physical(ids, table, counts, first_token=first)
        taken = mm.take_experts(weights, EXPERT_IDS)
        y, load = mm.moe(x, taken, physical, topk_weights, return_expert_load=True)
        folded = mm.logical_load(jax.lax.all_gather(load, "expert", tiled=True), table, counts)
        return y, physical, folded[None]

    f = jax.shard_map(local, mesh=mesh, in_specs=(*(spec,) * 4, P(), P()), out_specs=(spec,) * 3, check_vma=check_vma)
    y, physical, folded = jax.jit(f)(*place_all(mesh, layer), table, counts)
    assert_both_match_model((y, folded[0]), layer)
    np.testing.assert_array_equal(physical, model(np.where(np.asarray(layer.ids) < E, layer.ids, -1), EXPERT_IDS))


def test_maps_on_two_explicit_meshes_are_refused(each_platform):
    one, other = make_mesh({"expert": 8}, EXPLICIT), make_mesh({"x": 8}, EXPLICIT)
    with pytest.raises(ShardingError, match="num_replicas is on the mesh .* and ids on .*, wanted one mesh"):
        mm.to_physical(place(one, np.zeros((8, 2), np.int32), "expert"), TABLE, place(other, COUNTS))


def test_each_device_maps_its_own_tokens(each_platform):
    mesh = make_mesh(MESHES["data x expert"], AUTO)
    ids = place(mesh, np.zeros((8, 8, 3), np.int32), "data", "expert")
    table, counts = (place(mesh, value) for value in mm.replica_map(EXPERT_IDS, E, 4))
    compiled = jax.jit(mm.to_physical).lower(ids, table, counts).compile()
    text = str(compiled.as_text())
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "permute("))
    assert compiled(ids, table, counts).sharding.is_equivalent_to(ids.sharding, ids.ndim)


def test_loads_beyond_int32_are_its_largest():
    table, counts = np.array([[0], [1]]), np.array([1, 1])
    for load in (np.array([2**32 - 1, 5], np.uint32), jnp.array([2**32 - 1, 5], jnp.uint32), np.array([3 * 10**9, 5])):
        assert mm.logical_load(load, table, counts).tolist() == [2**31 - 1, 5]


def test_maps_too_large_for_any_memory():
    with pytest.raises(ArgumentError, match="num_experts times max_replicas is .*, wanted less than 2.31"):
        mm.replica_map(np.array([0]), 2**20, 2**11)
