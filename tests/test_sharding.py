"""The layer on meshes whose axes are automatic or explicit, and many layers; test_manual_sharding.py has the manual axes."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ShapeError, ShardingError
from jax_megamoe.operands import Operands
from tests.support import meshes
from tests.support.cases import exhaustive, one_in
from tests.support.compare import difference
from tests.support.expert_layer import H, assert_matches_model, make_layer, packed_weights
from tests.support.hlo import opcodes_of_large_results
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
    scan_over_layers,
)

pytestmark = pytest.mark.usefixtures("each_platform")


# Automatic and explicit: the global view.


@pytest.mark.parametrize("kind", [EXPLICIT, (AUTO, EXPLICIT), (EXPLICIT, AUTO)], ids=["both", "expert", "data"])
@pytest.mark.parametrize(
    "with_context",
    [False, exhaustive(True)],
    ids=["mesh of arguments", "mesh of context"],
)
def test_reference_on_explicit_axes(kind, with_context):
    mesh, layer = make_mesh({"data": 2, "expert": 4}, kind), make_layer()
    x, *others = place_all(mesh, layer)
    folded = [value.reshape(4, 4, -1) for value in (layer.x, layer.ids, layer.topk_weights)]
    folded = [place(mesh, value, "data", "expert") for value in folded]
    with jax.set_mesh(mesh) if with_context else contextlib.nullcontext():
        result = mm.reference.moe(x, *others, return_expert_load=True)
        rows = jax.jit(mm.reference.moe)(folded[0], others[0], *folded[1:])
        wanted = jax.jit(moe_and_load)(x, *others)
    assert_both_match_model(result, layer)
    assert [jax.typeof(value) for value in result] == [jax.typeof(value) for value in wanted]
    assert jax.typeof(rows) == jax.typeof(folded[0])
    assert_matches_model(jnp.asarray(np.asarray(rows).reshape(layer.x.shape)), layer)


VIEWS = {
    "auto": (AUTO, False),
    "auto, mesh of context": (AUTO, True),
    "explicit": (EXPLICIT, False),
    "explicit, mesh of context": (EXPLICIT, True),
}


@pytest.mark.parametrize(("view", "sizes"), one_in(4, VIEWS, MESHES))
def test_global_view(sizes, view):
    kind, with_context = view
    mesh, layer = make_mesh(sizes, kind), make_layer()
    x, *others = place_all(mesh, layer)
    with jax.set_mesh(mesh) if with_context else contextlib.nullcontext():
        y, load = jax.jit(moe_and_load)(x, *others)
    assert_both_match_model((y, load), layer)
    assert y.sharding.is_equivalent_to(x.sharding, y.ndim)
    assert jax.typeof(y) == jax.typeof(x)
    assert load.sharding.is_equivalent_to(NamedSharding(mesh, P("expert" if "expert" in sizes else None)), 1)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_eager(kind):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer()
    assert_both_match_model(moe_and_load(*place_all(mesh, layer)), layer)
    with jax.set_mesh(mesh):
        assert_both_match_model(moe_and_load(*place_all(mesh, layer)), layer)


@pytest.mark.parametrize(("kind", "jit"), one_in(2, KINDS, {"eager": False, "jit": True}))
def test_only_the_weights_are_on_the_mesh(kind, jit):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer()
    arguments = layer.x, place(mesh, layer.weights, "expert"), layer.ids, layer.topk_weights
    assert_both_match_model((jax.jit(moe_and_load) if jit else moe_and_load)(*arguments), layer)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_permuted_devices(kind):
    mesh, layer = make_mesh(MESHES["data x expert"], kind, reverse=True), make_layer()
    assert_both_match_model(jax.jit(moe_and_load)(*place_all(mesh, layer)), layer)


def test_bits_of_a_token_do_not_depend_on_its_rank():
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer(32)
    x, weights, ids, topk_weights = place_all(mesh, layer)
    y = jax.jit(mm.moe)(x, weights, ids, topk_weights)
    # By 5 ranks and a half, so that tokens have other neighbours, too.
    rolled = (place(mesh, jnp.roll(value, 22, axis=0), "expert") for value in (layer.x, layer.ids, layer.topk_weights))
    x, ids, topk_weights = rolled
    moved = jnp.roll(jax.jit(mm.moe)(x, weights, ids, topk_weights), -22, axis=0)
    np.testing.assert_array_equal(np.asarray(y).view(np.uint16), np.asarray(moved).view(np.uint16))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_expert_axis_of_two_mesh_axes(kind):
    mesh, layer = make_mesh({"a": 2, "b": 2, "c": 2}, kind), make_layer()
    axes: dict[str, Any] = {"expert_axis": ("c", "a"), "token_axes": ("a", "b", "c")}
    arguments = place_all(mesh, layer, tokens=axes["token_axes"], experts=("c", "a"))
    assert_both_match_model(jax.jit(lambda *a: mm.moe(*a, **axes, return_expert_load=True))(*arguments), layer)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_tokens_split_over_a_part_of_the_expert_axes(kind):
    mesh, layer = make_mesh({"a": 2, "b": 2, "c": 2}, kind), make_layer()
    axes: dict[str, Any] = {"expert_axis": ("a", "b"), "token_axes": ("b", "c")}
    arguments = place_all(mesh, layer, tokens=("b", "c"), experts=("a", "b"))
    assert_both_match_model(jax.jit(lambda *a: mm.moe(*a, **axes, return_expert_load=True))(*arguments), layer)


@pytest.mark.parametrize(
    ("kind", "tokens"), [*one_in(2, KINDS, [None, "expert"]), *(exhaustive(kind, "data") for kind in KINDS.values())]
)
def test_tokens_replicated_over_some_axes(kind, tokens):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer()
    arguments = place_all(mesh, layer, tokens=tokens)
    y, load = jax.jit(lambda *a: mm.moe(*a, token_axes=tokens, return_expert_load=True))(*arguments)
    assert_both_match_model((y, load), layer)
    assert jax.typeof(y) == jax.typeof(arguments[0])


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_no_expert_axis_is_the_local_op(kind):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer()
    arguments = place_all(mesh, layer, experts=None)
    compiled = jax.jit(lambda *a: mm.moe(*a, expert_axis=None)).lower(*arguments).compile()
    assert_matches_model(compiled(*arguments), layer)
    text = str(compiled.as_text())
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "permute("))


@pytest.mark.parametrize(
    ("sizes", "num_tokens"), one_in(2, {name: MESHES[name] for name in ("expert", "data x expert")}, [0, 1, 8, 5, 13])
)
def test_padding(sizes, num_tokens):
    mesh, layer = make_mesh(sizes, AUTO), make_layer(num_tokens)
    arguments = place_all(mesh, layer, tokens=None)
    assert_both_match_model(jax.jit(moe_and_load)(*arguments), layer)
    with jax.set_mesh(mesh):
        assert_both_match_model(moe_and_load(layer.x, arguments[1], layer.ids, layer.topk_weights), layer)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_no_tokens_on_a_mesh(kind):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer(0)
    y, load = jax.jit(moe_and_load)(*place_all(mesh, layer))
    assert y.shape == (0, H) and not np.asarray(load).any()


@pytest.mark.parametrize(
    ("kind", "spec"), one_in(2, KINDS, [("data",), ("data", "expert"), (("data", "expert"),), (None, "expert")])
)
def test_two_leading_dimensions(kind, spec):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer(32)
    x, ids, topk_weights = (place(mesh, v.reshape(8, 4, -1), *spec) for v in (layer.x, layer.ids, layer.topk_weights))
    y, load = jax.jit(moe_and_load)(x, place(mesh, layer.weights, "expert"), ids, topk_weights)
    assert_both_match_model((y, load), layer)
    assert jax.typeof(y) == jax.typeof(x)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_vmap_over_sharded_tokens(kind):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer(32)
    x, ids, topk_weights = (
        place(mesh, v.reshape(4, 8, -1), None, ("data", "expert")) for v in (layer.x, layer.ids, layer.topk_weights)
    )
    weights = place(mesh, layer.weights, "expert")
    y, load = jax.jit(jax.vmap(lambda x, ids, topk_weights: moe_and_load(x, weights, ids, topk_weights)))(
        x, ids, topk_weights
    )
    assert_matches_model(y, layer)
    np.testing.assert_array_equal(load.sum(0), layer.load)
    assert jax.typeof(y) == jax.typeof(x)


def test_vmap_over_a_sharded_axis():
    mesh, layer = make_mesh(MESHES["data x expert"], EXPLICIT), make_layer(32)
    x, ids, topk_weights = (
        place(mesh, v.reshape(4, 8, -1), "data", "expert") for v in (layer.x, layer.ids, layer.topk_weights)
    )
    weights = place(mesh, layer.weights, "expert")
    with jax.set_mesh(mesh):
        y, load = jax.jit(jax.vmap(lambda x, ids, topk_weights: moe_and_load(x, weights, ids, topk_weights)))(
            x, ids, topk_weights
        )
    assert_matches_model(y, layer)
    np.testing.assert_array_equal(load.sum(0), layer.load)


def test_one_axis_explicit_one_automatic():
    for kinds in ((EXPLICIT, AUTO), (AUTO, EXPLICIT)):
        mesh, layer = make_mesh(MESHES["data x expert"], kinds), make_layer()
        assert_both_match_model(jax.jit(moe_and_load)(*place_all(mesh, layer)), layer)


def test_automatic_axes_serve_what_arrives_otherwise():
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    x = place(mesh, layer.x, None, "expert")
    ids = place(mesh, layer.ids, "expert")
    assert_both_match_model(
        jax.jit(moe_and_load)(x, place(mesh, layer.weights, "expert"), ids, layer.topk_weights), layer
    )


def test_explicit_axes_serve_other_ids_and_replicated_weights():
    mesh, layer = make_mesh(MESHES["data x expert"], EXPLICIT), make_layer()
    x, weights, _, _ = place_all(mesh, layer)
    ids, topk_weights = place(mesh, layer.ids, "expert"), place(mesh, layer.topk_weights)
    assert_both_match_model(jax.jit(moe_and_load)(x, weights, ids, topk_weights), layer)
    assert_both_match_model(jax.jit(moe_and_load)(x, place(mesh, layer.weights), ids, topk_weights), layer)


@pytest.mark.usefixtures("eight_devices")
def test_specs_that_cannot_be_served():
    mesh, layer = make_mesh(MESHES["data x expert"], EXPLICIT), make_layer()
    x, weights, ids, topk_weights = place_all(mesh, layer)
    with pytest.raises(ShardingError, match=r"x is bfloat16\[16,256@expert\], wanted its last dimension"):
        jax.jit(mm.moe)(place(mesh, layer.x, None, "expert"), weights, ids, topk_weights)
    with pytest.raises(ShardingError, match=r"weights.gate_up is .*2@data.*, wanted dimension 0, the experts"):
        jax.jit(mm.moe)(x, place(mesh, layer.weights, "expert", "data"), ids, topk_weights)
    with pytest.raises(
        ShardingError,
        match=r"weights.gate_up is .*8@data.*the experts, split over 'expert' or nothing split",
    ):
        jax.jit(mm.moe)(x, place(mesh, layer.weights, "data"), ids, topk_weights)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_experts_have_to_divide(kind):
    mesh, layer = make_mesh({"expert": 3}, kind), make_layer(3)
    with pytest.raises(ShapeError, match="weights have 8 experts, wanted a multiple of the 3 ranks"):
        jax.jit(mm.moe)(place(mesh, layer.x, "expert"), layer.weights, layer.ids, layer.topk_weights)


# Many layers.


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_stacked_weights_in_a_scan(kind):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer()
    stacked = place(mesh, mm.stack_experts([packed_weights(0), packed_weights(1)]), None, "expert")
    x, _, ids, topk_weights = place_all(mesh, layer)
    y = jax.jit(scan_over_layers)(x, stacked, ids, topk_weights)
    wanted = mm.moe(mm.moe(*layer[:4]), packed_weights(1), layer.ids, layer.topk_weights)
    # The ranks' FP32 sums come in another order; the second layer may then quantise a value to its neighbour.
    assert difference(y, wanted) < 1e-4


def test_while_loop_on_a_mesh():
    mesh, layer = make_mesh(MESHES["data x expert"], EXPLICIT), make_layer()
    x, *others = place_all(mesh, layer)

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state[0] + 1, mm.moe(x, *others)

    _, y = jax.jit(lambda x: jax.lax.while_loop(lambda state: state[0] < 2, body, (jnp.int32(0), x)))(x)
    assert_matches_model(y, layer)


# What happens to the weights before the kernel sees them.


@pytest.fixture
def opaque_kernel(monkeypatch):
    """The local op as one opaque call, as on a GPU, so that the compiled program shows what its operands go through."""

    def call(operands: Operands, *, out_dtype: Any, **_: Any) -> tuple[jax.Array, jax.Array]:
        y, load = (operands.x.shape, out_dtype), ((operands.num_local_experts,), jnp.int32)
        results = tuple(jax.ShapeDtypeStruct(*shape_and_dtype) for shape_and_dtype in (y, load))
        return jax.pure_callback(lambda *_: tuple(np.zeros(r.shape, r.dtype) for r in results), results, *operands.row)

    monkeypatch.setattr(mm.reference, "moe_local", call)


@pytest.mark.usefixtures("opaque_kernel")
@pytest.mark.parametrize(
    ("stacked", "way"), one_in(2, {"one layer": False, "scan over layers": True}, ["auto", "explicit", "manual"])
)
def test_weights_are_neither_gathered_nor_copied(way, stacked):
    mesh, layer = make_mesh(MESHES["data x expert"], EXPLICIT if way == "explicit" else AUTO), make_layer()
    lead = (None,) if stacked else ()
    weights = mm.stack_experts([packed_weights(0), packed_weights(1)]) if stacked else layer.weights
    x, _, ids, topk_weights = place_all(mesh, layer)
    function = scan_over_layers if stacked else mm.moe
    if way == "manual":
        tokens = P(("data", "expert"))
        function = jax.shard_map(
            function, mesh=mesh, in_specs=(tokens, P(*lead, "expert"), tokens, tokens), out_specs=tokens
        )
    arguments = x, place(mesh, weights, *lead, "expert"), ids, topk_weights
    text = str(jax.jit(lambda *a: function(*a)).lower(*arguments).compile().as_text())
    # The smaller one of the two FP8 leaves, on one of the four ranks, one layer.
    num_elements = layer.weights.down.size // 4
    allowed = {"parameter", "tuple", "get-tuple-element", "while", "bitcast", "call", "custom-call", "conditional"}
    found = opcodes_of_large_results(text, num_elements)
    assert "parameter" in found and found <= allowed, found
    assert "xla_ffi_" in text or "jax_megamoe.moe_peers" in text


@pytest.mark.usefixtures("opaque_kernel", "eight_devices")
def test_the_check_above_sees_a_copy():
    if meshes.platform != "cpu":
        pytest.skip("the opcodes are those of XLA for CPUs")
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    x, _, ids, topk_weights = place_all(mesh, layer)
    compiled = (
        jax.jit(lambda *a: mm.moe(*a)).lower(x, place(mesh, layer.weights, None, "data"), ids, topk_weights).compile()
    )
    opcodes = opcodes_of_large_results(str(compiled.as_text()), layer.weights.down.size // 4)
    assert opcodes & {"all-gather", "all-to-all", "dynamic-slice", "copy", "fusion", "collective-permute"}
