"""Axis names, meshes and numbers of experts that don't fit: right results, named errors, or a line in the log."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ShapeError, ShardingError
from tests.support.expert_layer import E, assert_matches_model, make_layer, packed_weights
from tests.support.hlo import opcodes_of_large_results
from tests.support.meshes import (
    AUTO,
    EXPLICIT,
    assert_both_match_model,
    make_mesh,
    moe_and_load,
    place,
    place_all,
    scan_over_layers,
)

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 host devices")

DP_EP = {"dp": 2, "ep": 4}
DATA_EXPERT = {"data": 2, "expert": 4}
FSDP = {"data": 1, "fsdp": 4, "tensor": 1, "expert": 2}


def put(mesh: Mesh, tokens: Any = None, experts: Any = None, num_tokens: int = 16) -> tuple[Any, ...]:
    return place_all(mesh, make_layer(num_tokens), tokens, experts)


# Names of axes.


@pytest.mark.parametrize("function", [mm.moe, mm.reference.moe], ids=["moe", "reference"])
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "axes, absent",
    [
        ({"expert_axis": "experts"}, "'experts'"),
        ({"expert_axis": ("expert", "model")}, "'model'"),
        ({"token_axes": "dp"}, "'dp'"),
        ({"token_axes": ("data", "expert", "fsdp", "x")}, "'fsdp', 'x'"),
        # As in the signature, but passed.
        ({"expert_axis": "ep", "token_axes": ["data", "ep"]}, "'ep'"),
    ],
    ids=str,
)
def test_names_that_the_mesh_lacks(function, kind, axes, absent):
    arguments = put(make_mesh(DATA_EXPERT, kind))
    name = next(iter(axes))
    text = f"{name} is .* and the mesh has no axis {absent}, wanted some of its axes 'data', 'expert': pass the axe?i?s"
    with pytest.raises(ShardingError, match=text):
        jax.eval_shape(functools.partial(function, **axes), *arguments)
    layer = make_layer()  # on no mesh, and kept for other tests
    with pytest.raises(ShardingError, match=text), jax.set_mesh(make_mesh(DATA_EXPERT, kind)):
        jax.eval_shape(functools.partial(function, **axes), *layer[:4])


@pytest.mark.parametrize("check_vma", [True, False])
def test_names_that_the_mesh_of_a_shard_map_lacks(check_vma):
    mesh = make_mesh(DATA_EXPERT, AUTO)
    function = functools.partial(mm.moe, expert_axis="model")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=check_vma)
    with pytest.raises(ShardingError, match="expert_axis is 'model' and the mesh has no axis 'model'"):
        jax.eval_shape(mapped, *make_layer()[:4])


def test_any_name_serves_without_a_mesh():
    layer = make_layer()
    assert_matches_model(mm.moe(*layer[:4], expert_axis="ep", token_axes=("dp", "ep")), layer)


@pytest.mark.parametrize("name", ["expert_axis", "token_axes"])
@pytest.mark.parametrize("axes", [0, 1.5, ("expert", 0), {"expert"}, P("expert"), (("a", "b"),)], ids=str)
def test_names_are_strings(name, axes):
    with pytest.raises(ShardingError, match=f"{name} is .*, wanted the name of a mesh axis, a tuple of names, or None"):
        mm.moe(*make_layer()[:4], **{name: axes})


def test_explicit_weights_over_an_axis_that_is_not_named():
    arguments = put(make_mesh({"data": 2, "model": 4}, EXPLICIT), "data", "model")
    with pytest.raises(ShardingError, match="weights.gate_up is .*@model.*pass expert_axis='model'") as error:
        jax.eval_shape(mm.moe, *arguments)
    assert "()" not in str(error.value)
    assert_matches_model(jax.jit(functools.partial(mm.moe, expert_axis="model"))(*arguments), make_layer())


# Inside shard_map nothing but names and marks tells how tokens are split.


@pytest.mark.parametrize("function", [mm.moe, mm.reference.moe], ids=["moe", "reference"])
def test_tokens_in_shard_map_without_marks(function):
    mesh, tokens = make_mesh(DP_EP, AUTO), P(("dp", "ep"))
    arguments = put(mesh, ("dp", "ep"), "ep")

    def mapped(**options: Any) -> Callable:
        specs: Any = {"in_specs": (tokens, P("ep"), tokens, tokens), "out_specs": tokens}
        return jax.shard_map(functools.partial(function, **options), mesh=mesh, **specs, check_vma=False)

    with pytest.raises(
        ShardingError, match=r"token_axes is left out.*split over 'ep'.*pass token_axes, or token_axes="
    ):
        jax.eval_shape(mapped(expert_axis="ep"), *arguments)
    assert_matches_model(jax.jit(mapped(expert_axis="ep", token_axes=("dp", "ep")))(*arguments), make_layer())


def test_tokens_in_shard_map_that_are_copies():
    mesh, arguments = make_mesh(DP_EP, AUTO), put(make_mesh(DP_EP, AUTO), None, "ep")
    specs: Any = {"in_specs": (P(), P("ep"), P(), P()), "out_specs": P(), "check_vma": False}
    for token_axes in ((), None, "dp"):  # over dp they are copies as well, which costs time only
        function = functools.partial(mm.moe, expert_axis="ep", token_axes=token_axes)
        assert_matches_model(jax.jit(jax.shard_map(function, mesh=mesh, **specs))(*arguments), make_layer())
    # An axis of one device splits nothing.
    mesh = make_mesh({"dp": 8, "ep": 1}, AUTO)
    specs = {"in_specs": (P("dp"), P("ep"), P("dp"), P("dp")), "out_specs": P("dp"), "check_vma": False}
    mapped = jax.shard_map(functools.partial(mm.moe, expert_axis="ep"), mesh=mesh, **specs)
    assert_matches_model(jax.jit(mapped)(*put(mesh, "dp", "ep")), make_layer())


# How many experts there are.


def with_number(weights: mm.ExpertWeights, num_experts: int) -> mm.ExpertWeights:
    return dataclasses.replace(weights, num_experts=num_experts)


@pytest.mark.parametrize("function", [mm.moe, mm.reference.moe], ids=["moe", "reference"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_weights_made_in_shard_map(function, check_vma):
    """They count a device's experts unless told of all."""
    mesh, spec = make_mesh({"expert": 8}, AUTO), P("expert")
    arguments = put(mesh, "expert", "expert")

    def mapped(num_experts: int) -> Callable:
        def f(x: Any, weights: mm.ExpertWeights, ids: Any, topk_weights: Any) -> Any:
            return function(x, with_number(weights, num_experts), ids, topk_weights)

        return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)

    text = "weights hold 1 experts on each of 8 devices along 'expert' and say that there are 1 in all, wanted 8: pass"
    with pytest.raises(ShapeError, match=f"{text} num_experts=8 to quantize_experts") as error:
        jax.eval_shape(mapped(1), *arguments)
    # Marks that say that the experts differ leave no other cure.
    assert ("expert_axis=None" in str(error.value)) != check_vma
    with pytest.raises(ShapeError, match="weights hold 1 experts on each device, wanted 16 / 8 along 'expert' or all"):
        jax.eval_shape(mapped(16), *arguments)
    assert_matches_model(jax.jit(mapped(8))(*arguments), make_layer())


def test_replicated_weights_in_shard_map_without_marks():
    mesh, spec = make_mesh({"expert": 8}, AUTO), P("expert")
    specs: Any = {"in_specs": (spec, P(), spec, spec), "out_specs": spec, "check_vma": False}
    with pytest.raises(ShapeError, match="wanted 64: .* or expert_axis=None to moe where each device has all experts"):
        jax.eval_shape(jax.shard_map(mm.moe, mesh=mesh, **specs), *make_layer()[:4])
    mapped = jax.shard_map(functools.partial(mm.moe, expert_axis=None), mesh=mesh, **specs)
    assert_matches_model(jax.jit(mapped)(*put(mesh, "expert")), make_layer())


def test_slices_without_an_expert_axis():
    mesh = make_mesh(DP_EP, AUTO)
    tokens = P(("dp", "ep"))
    mapped = jax.shard_map(mm.moe, mesh=mesh, in_specs=(tokens, P("ep"), tokens, tokens), out_specs=tokens)
    with pytest.raises(ShapeError, match="weights hold 2 of 8 experts.*pass as expert_axis what does, of 'dp', 'ep'"):
        jax.eval_shape(mapped, *make_layer()[:4])


@pytest.mark.parametrize("function", [mm.moe, mm.reference.moe], ids=["moe", "reference"])
def test_more_experts_than_are_said(function):
    """Redundant experts, and weights that were made in parts: ids count what the arrays hold."""
    layer = make_layer()
    more = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:2]]), layer.weights)
    text = r"weights hold 10 of 8 experts.*num_experts=10 where .* dataclasses.replace\(weights, num_experts=10\)"
    with pytest.raises(ShapeError, match=text):
        function(layer.x, more, layer.ids, layer.topk_weights)
    ids = jnp.where(layer.ids < 2, layer.ids + E, layer.ids)
    ids = jnp.where((layer.ids < 0) | (layer.ids >= E), -1, ids)
    assert_matches_model(function(layer.x, with_number(more, 10), ids, layer.topk_weights), layer)
    fewer = jax.tree.map(lambda leaf: leaf[:4], layer.weights)
    with pytest.raises(ShapeError, match="weights hold 4 of 8 experts.*inside jax.shard_map only"):
        function(layer.x, fewer, layer.ids, layer.topk_weights)


# Meshes.


def test_the_mesh_with_the_expert_axis_comes_first():
    """Tokens on a mesh of the same devices with other axes: nothing is gathered but them."""
    x, _, ids, topk_weights = put(make_mesh({"data": 2, "context": 4}, AUTO), ("data", "context"))
    weights = place(make_mesh(DATA_EXPERT, AUTO), packed_weights(), "expert")
    compiled = jax.jit(moe_and_load).lower(x, weights, ids, topk_weights).compile()
    assert_both_match_model(compiled(x, weights, ids, topk_weights), make_layer())
    assert "all-gather" not in opcodes_of_large_results(str(compiled.as_text()), weights.down.size)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_two_explicit_meshes(jit):
    function: Any = jax.jit(mm.moe) if jit else mm.moe
    mesh = make_mesh(DATA_EXPERT, EXPLICIT)
    x, _, ids, topk_weights = put(make_mesh({"data": 2, "context": 4}, EXPLICIT), "data")
    weights = place(mesh, packed_weights(), "expert")
    text = r"x is on the mesh \(data: 2, context: 4\), wanted that of weights.gate_up \(data: 2, expert: 4\)"
    with pytest.raises(ShardingError, match=text):
        function(x, weights, ids, topk_weights)
    with jax.set_mesh(mesh):  # says which one, and has the axes that the types of x, ids and weights name
        assert_matches_model(function(x, weights, ids, topk_weights), make_layer())
    x = place(make_mesh({"data": 2, "context": 4}, EXPLICIT), make_layer().x, "context")
    with jax.set_mesh(mesh), pytest.raises(ShardingError, match="x is on the mesh .* wanted the mesh of the context"):
        function(x, weights, ids, topk_weights)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_weights_in_a_closure(kind):
    mesh, layer = make_mesh(DATA_EXPERT, kind), make_layer()
    weights = place(mesh, layer.weights, "expert")
    arguments = layer.x, layer.ids, layer.topk_weights
    assert_matches_model(jax.jit(lambda x, ids, topk_weights: mm.moe(x, weights, ids, topk_weights))(*arguments), layer)
    assert_matches_model(
        jax.jit(functools.partial(mm.moe, weights=weights))(
            layer.x, topk_ids=layer.ids, topk_weights=layer.topk_weights
        ),
        layer,
    )
    assert_matches_model(jax.jit(lambda: mm.moe(layer.x, weights, layer.ids, layer.topk_weights))(), layer)
    mapped = jax.vmap(lambda x, ids, topk_weights: mm.moe(x, weights, ids, topk_weights))
    assert_matches_model(jax.jit(mapped)(*arguments), layer)


def test_stacked_weights_in_a_closure():
    layer = make_layer()
    stacked = mm.stack_experts([packed_weights(0), packed_weights(1)])
    placed = place(make_mesh(DATA_EXPERT, AUTO), stacked, None, "expert")
    wanted = scan_over_layers(layer.x, stacked, layer.ids, layer.topk_weights)
    y = jax.jit(lambda x: scan_over_layers(x, placed, layer.ids, layer.topk_weights))(layer.x)
    assert len(y.sharding.device_set) == 8
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(wanted, np.float32), rtol=0.1, atol=0.02)


def test_a_closure_that_hides_the_devices():
    layer = make_layer()
    weights = place(make_mesh(DATA_EXPERT, AUTO), layer.weights, "expert")
    with pytest.raises(ShardingError, match=r"on 8 devices, and nothing .* more than 1: call it under jax.set_mesh"):
        jax.jit(lambda x: jax.jit(mm.moe)(x, weights, layer.ids, layer.topk_weights))(layer.x)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_vmap_over_a_dimension_that_is_split_over_the_expert_axis(kind):
    mesh, layer = make_mesh(DATA_EXPERT, kind), make_layer(32)
    weights = place(mesh, layer.weights, "expert")
    tokens = [place(mesh, value.reshape(4, 8, -1), "expert") for value in (layer.x, layer.ids, layer.topk_weights)]
    assert_matches_model(
        jax.jit(jax.vmap(lambda x, ids, topk_weights: mm.moe(x, weights, ids, topk_weights)))(*tokens), layer
    )


def test_sharding_of_the_result_over_automatic_axes():
    """As the docstring says: over the token axes, however x is split."""
    mesh = make_mesh(DATA_EXPERT, AUTO)
    for tokens in (None, "data", ("data", "expert")):
        y = jax.jit(mm.moe)(*put(mesh, tokens, "expert"))
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "expert"))), 2)
    y = jax.jit(mm.moe)(*put(mesh, None, "expert", num_tokens=13))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P()), 2)


# Memory.


@pytest.mark.parametrize("function", [mm.moe, mm.reference.moe], ids=["moe", "reference"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_host_memory(function, jit):
    layer = make_layer()
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0], memory_kind="pinned_host")
    weights, x = jax.device_put(layer.weights, host), jax.device_put(layer.x, host)
    f: Any = jax.jit(function) if jit else function
    with pytest.raises(
        ShardingError, match=r"weights.gate_up is in host memory.*jax.device_put\(weights, jax.memory.Sp"
    ):
        f(layer.x, weights, layer.ids, layer.topk_weights)
    with pytest.raises(ShardingError, match="x is in host memory, wanted device memory"):
        f(x, layer.weights, layer.ids, layer.topk_weights)

    def moved(weights: mm.ExpertWeights) -> Any:
        return function(layer.x, jax.device_put(weights, jax.memory.Space.Device), layer.ids, layer.topk_weights)

    assert_matches_model(jax.jit(moved)(weights), layer)


@pytest.mark.parametrize("function", [mm.moe, mm.reference.moe], ids=["moe", "reference"])
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_meshes_with_other_devices_or_another_order_are_refused_by_name(function, kind):
    x, _, ids, topk_weights = put(make_mesh({"expert": 8}, kind, reverse=True), "expert")
    weights = put(make_mesh({"expert": 8}, kind), "expert", "expert")[1]
    with pytest.raises(ShardingError, match=r"weights\.gate_up is on the devices \[0, 1, .* wanted \[7, 6, .* like x"):
        function(x, weights, ids, topk_weights)


@pytest.mark.parametrize("function", [mm.moe, mm.reference.moe], ids=["moe", "reference"])
def test_weights_that_marks_show_split_over_another_axis(function):
    mesh, layer, both = make_mesh({"a": 2, "b": 4}, AUTO), make_layer(), ("a", "b")
    # Eight experts, of which each device gets four; over b that would be two.
    weights = with_number(layer.weights, E)
    in_specs = (P(both), P("b"), P(both), P(both))
    mapped = jax.shard_map(lambda *v: function(*v, expert_axis="b"), mesh=mesh, in_specs=in_specs, out_specs=P(both))
    assert_matches_model(jax.jit(mapped)(layer.x, weights, layer.ids, layer.topk_weights), layer)
    square = make_mesh({"a": 2, "b": 2}, AUTO)
    mapped = jax.shard_map(
        lambda *v: function(*v, expert_axis="b"),
        mesh=square,
        in_specs=(P(both), P("a"), P(both), P(both)),
        out_specs=P(both),
    )
    with pytest.raises(ShardingError, match="weights are the same on all devices along 'b', of expert_axis"):
        jax.jit(mapped)(layer.x, weights, layer.ids, layer.topk_weights)


def test_leaves_that_are_split_unlike_are_told_first():
    mesh, layer = make_mesh(DATA_EXPERT, EXPLICIT), make_layer()
    x, weights, ids, topk_weights = put(mesh, ("data", "expert"), "expert")
    weights = dataclasses.replace(weights, down=place(mesh, layer.weights.down, "data"))
    with pytest.raises(
        ShardingError, match=r"weights\.gate_up has its experts over 'expert' and weights\.down over 'data'"
    ):
        mm.moe(x, weights, ids, topk_weights)


def test_single_devices_that_differ_are_refused_by_name():
    layer, devices = make_layer(), jax.devices("cpu")
    x = jax.device_put(layer.x, devices[3])
    weights = jax.device_put(layer.weights, devices[0])
    with pytest.raises(
        ShardingError, match=r"weights\.gate_up is on the devices \[0\], in this order, wanted \[3\] like x"
    ):
        mm.moe(x, weights, layer.ids, layer.topk_weights)
    assert_matches_model(mm.moe(x, jax.device_put(layer.weights, devices[3]), layer.ids, layer.topk_weights), layer)


def test_whatever_is_on_another_device_is_refused_by_name():
    """Not only the arrays that a mesh is found by."""
    layer, (here, there) = make_layer(), jax.devices("cpu")[1:3]
    tokens = (layer.x, layer.ids, layer.topk_weights, layer.weights)
    x, ids, topk_weights, weights = (jax.device_put(array, here) for array in tokens)
    stacked = jax.device_put(mm.stack_experts([layer.weights] * 2), here)
    number, table = jax.device_put(jnp.int32(1), there), jax.device_put(jnp.zeros((8, 1), jnp.int32), there)
    matrices = [jnp.ones((2, 128, 128)), jnp.ones((2, 128, 128)), jax.device_put(jnp.ones((2, 128, 128)), there)]
    calls: list[Callable[[], object]] = [
        lambda: mm.moe(x, weights, ids, topk_weights, num_valid_tokens=number),
        lambda: mm.reference.moe(x, stacked, ids, topk_weights, layer=number),
        lambda: mm.take_experts(weights, jax.device_put(jnp.arange(8), there)),
        lambda: mm.to_physical(ids, table, jnp.ones(8, jnp.int32)),
        lambda: mm.logical_load(jax.device_put(jnp.zeros(8, jnp.int32), here), table, jnp.ones(8, jnp.int32)),
        lambda: mm.route(jax.device_put(jnp.zeros((4, 8)), here), 2, bias=jax.device_put(jnp.zeros(8), there)),
        lambda: mm.quantize_experts(jax.device_put(matrices[0], here), *matrices[1:]),
        lambda: mm.stack_experts([weights, jax.device_put(layer.weights, there)]),
    ]
    for call in calls:
        with pytest.raises(ShardingError, match="devices|wanted all of it split like layer 0, over the same mesh"):
            call()
    assert mm.moe(x, weights, ids, topk_weights, num_valid_tokens=jnp.int32(1)).devices() == {here}
