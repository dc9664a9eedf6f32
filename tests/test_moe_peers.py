"""The experts of several ranks on GPUs, as far as no GPU is needed: what the call says, and what JAX and XLA make of it."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.operands import Operands
from jax_megamoe.primitives import _groups, moe_peers
from jax_megamoe.primitives.moe_peers import moe_peers_p
from tests.support.cuda_lowering import FUSED, LOCAL, PEER_WORKSPACE, attribute, calls, cuda_text
from tests.support.expert_layer import E, H, I, K, assert_matches_model, make_layer, packed_weights
from tests.support.hlo import opcodes_of_large_results
from tests.support.meshes import (
    AUTO,
    EXPLICIT,
    MESHES,
    assert_both_match_model,
    make_mesh,
    moe_and_load,
    place,
    place_all,
    scan_over_layers,
)
from tests.support.skips import unless, why_no_host_devices

pytestmark = unless(why_no_host_devices())

SPLIT = {name: MESHES[name] for name in ("expert", "data x expert", "expert x model")}


def groups(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", attribute(text, "replica_groups"))]


# What the call is.


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("sizes", SPLIT.values(), ids=SPLIT)
def test_one_call_with_the_groups(built, sizes, kind):
    mesh, layer = make_mesh(sizes, kind), make_layer()
    text = cuda_text(
        lambda *a: mm.moe(*a, activation_clamp=10.0, routed_scaling_factor=1.5, return_expert_load=True),
        *place_all(mesh, layer),
    )
    assert calls(text) == [FUSED]
    assert not re.search(r"all_gather|all_to_all|reduce_scatter|stablehlo\.case", text)
    assert groups(text) == _groups.replica_groups(sizes, ("expert",)).ravel().tolist()
    num_ranks, num_tokens = sizes["expert"], 16 // (sizes["expert"] * sizes.get("data", 1))
    assert attribute(text, "group_size") == str(num_ranks)
    assert attribute(text, " timeout_microseconds") == "30000000"
    assert attribute(text, "setup_timeout_microseconds") == "120000000"
    assert attribute(text, "activation_clamp") == "1.000000e+01"
    assert attribute(text, "routed_scaling_factor") == "1.500000e+00"
    assert "has_side_effect" not in text  # XLA would run calls with sliced operands twice
    (call,) = [line for line in text.splitlines() if FUSED in line]
    operands, results = (re.findall(r"tensor<([^>]*)>", types) for types in call.rsplit(": (", 1)[1].split("->"))
    assert (operands[0], operands[5:]) == (
        f"{num_tokens}x{H}xbf16",
        [f"{num_tokens}x{K}xi32", f"{num_tokens}x{K}xf32", "i32", "i32"],  # and layer, mesh_rank
    )
    assert results == [f"{num_tokens}x{H}xbf16", f"{E // num_ranks}xi32", f"{PEER_WORKSPACE}xui8"]
    assert set(built.asked) == {(num_tokens, K, H, I, E // num_ranks, "fp8_block", False, num_ranks)}


@pytest.mark.usefixtures("built")
def test_order_of_devices_has_no_influence():
    """The ids are places in the mesh; which devices these are is for the device assignment of the program."""
    layer, found = make_layer(), []
    for order in (np.arange(8), np.arange(8)[::-1], np.random.default_rng(3).permutation(8)):
        mesh = Mesh(np.array(jax.devices("cpu")[:8])[order].reshape(2, 4), ("data", "expert"), axis_types=(AUTO,) * 2)
        found.append(groups(cuda_text(mm.moe, *place_all(mesh, layer))))
    assert found == [[0, 1, 2, 3, 4, 5, 6, 7]] * 3


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_expert_axis_of_two_mesh_axes(kind):
    mesh, layer = make_mesh({"a": 2, "b": 2, "c": 2}, kind), make_layer()
    arguments = place_all(mesh, layer, tokens=("a", "b", "c"), experts=("c", "a"))
    text = cuda_text(lambda *a: mm.moe(*a, expert_axis=("c", "a"), token_axes=("a", "b", "c")), *arguments)
    assert calls(text) == [FUSED] and attribute(text, "group_size") == "4"
    assert groups(text) == [0, 4, 1, 5, 2, 6, 3, 7]


def in_shard_map(mesh: Mesh, manual: tuple[str, ...], check_vma: bool, function: Any = moe_and_load) -> Callable:
    tokens = tuple(axis for axis in ("data", "expert") if axis in manual)
    experts = P("expert") if "expert" in manual else P()
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P(tokens), experts, P(tokens), P(tokens)),
        out_specs=(P(tokens), experts),
        axis_names=set(manual),
        check_vma=check_vma,
    )


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("manual", [("data", "expert"), ("data",), ("expert",)], ids=str)
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_manual(manual, kind, check_vma):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer()
    others = tuple(axis for axis in ("data", "expert") if axis not in manual)
    text = cuda_text(in_shard_map(mesh, manual, check_vma), *place_all(mesh, layer, tokens=(*manual, *others)))
    # Where the region is nested, the groups are still those of the whole mesh.
    assert calls(text) == [FUSED] and groups(text) == list(range(8))


@pytest.mark.usefixtures("built")
def test_an_abstract_mesh_serves():
    """As for a machine that is not here: more ranks than this one has devices, and shapes instead of arrays."""
    mesh = AbstractMesh((4, 4), ("data", "expert"), axis_types=(AxisType.Explicit,) * 2)
    layer = make_layer()

    def typed(value: Any, *spec: Any) -> Any:
        return jax.tree.map(
            lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=jax.NamedSharding(mesh, P(*spec))), value
        )

    tokens = ("data", "expert")
    arguments = (typed(v, s) for v, s in zip(layer[:4], (tokens, "expert", tokens, tokens), strict=True))
    text = cuda_text(mm.moe, *arguments)
    assert calls(text) == [FUSED] and groups(text) == list(range(16))


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_export(kind):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer()
    exported = jax.export.export(
        jax.jit(lambda *a: mm.moe(*a)),
        platforms=("cuda",),
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(FUSED)],
    )(*place_all(mesh, layer))
    assert exported.nr_devices == 8 and calls(exported.mlir_module()) == [FUSED]


@pytest.mark.usefixtures("built")
def test_scan_over_stacked_layers_is_one_call():
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    stacked = place(mesh, mm.stack_experts([packed_weights(0), packed_weights(1)]), None, "expert")
    x, _, ids, topk_weights = place_all(mesh, layer)
    text = cuda_text(scan_over_layers, x, stacked, ids, topk_weights)
    assert calls(text) == [FUSED]
    (call,) = [line for line in text.splitlines() if FUSED in line]
    for leaf in jax.tree.leaves(stacked):
        assert "tensor<" + "x".join(map(str, (2, E // 4, *leaf.shape[2:]))) in call
        # No single layer of a rank, nor of all.
        assert not any("tensor<" + "x".join(map(str, (n, *leaf.shape[2:]))) + "x" in text for n in (E // 4, E))


@pytest.mark.usefixtures("built")
def test_vmap_is_one_call():
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer(32)
    x, ids, topk_weights = (
        place(mesh, v.reshape(4, 8, -1), None, "expert") for v in (layer.x, layer.ids, layer.topk_weights)
    )
    weights = place(mesh, layer.weights, "expert")
    text = cuda_text(jax.vmap(mm.moe, in_axes=(0, None, 0, 0)), x, weights, ids, topk_weights)
    assert calls(text) == [FUSED] and f"(tensor<4x{H}xbf16>" in text


@pytest.mark.usefixtures("built")
def test_padding_makes_ranks_equal():
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer(5)
    text = cuda_text(mm.moe, *place_all(mesh, layer, tokens=None))
    assert calls(text) == [FUSED] and f"-> (tensor<1x{H}xbf16>" in text


@pytest.mark.usefixtures("built")
def test_no_tokens_need_no_call():
    mesh = make_mesh(MESHES["expert"], AUTO)
    assert calls(cuda_text(moe_and_load, *place_all(mesh, make_layer(0)))) == []


@pytest.mark.usefixtures("built")
def test_one_rank_is_the_kernel_of_one_device():
    for sizes in (MESHES["data alone"], MESHES["one device"]):
        assert calls(cuda_text(mm.moe, *place_all(make_mesh(sizes, AUTO), make_layer()))) == [LOCAL]
    mesh = make_mesh(MESHES["data x expert"], EXPLICIT)
    # All experts on each device.
    assert calls(cuda_text(mm.moe, *place_all(mesh, make_layer(), experts=None))) == [LOCAL]


# To JAX's transformations.


def test_vmap_inside_shard_map():
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer(32)
    tokens = P(None, ("data", "expert"))
    x, ids, topk_weights = (place(mesh, v.reshape(4, 8, -1), *tokens) for v in (layer.x, layer.ids, layer.topk_weights))
    weights = place(mesh, layer.weights, "expert")
    for check_vma in (True, False):
        f = jax.shard_map(
            jax.vmap(moe_and_load, in_axes=(0, None, 0, 0)),
            mesh=mesh,
            in_specs=(tokens, P("expert"), tokens, tokens),
            out_specs=(tokens, P(None, "expert")),
            check_vma=check_vma,
        )
        jaxpr = str(jax.make_jaxpr(f)(x, weights, ids, topk_weights))
        assert jaxpr.count(moe_peers_p.name) == 1
        y, load = jax.jit(f)(x, weights, ids, topk_weights)
        assert_matches_model(y, layer)
        for element, wanted in zip(load, np.asarray(ids).reshape(4, -1), strict=True):
            np.testing.assert_array_equal(element, np.bincount(wanted[(wanted >= 0) & (wanted < E)], minlength=E))


def test_vmap_with_replicated_tokens():
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer(32)
    f = jax.shard_map(
        jax.vmap(moe_and_load, in_axes=(0, None, 0, 0)),
        mesh=mesh,
        in_specs=(P(None, "data"), P("expert"), P(None, "data"), P(None, "data")),
        out_specs=(P(None, "data"), P(None, "expert")),
    )
    x, ids, topk_weights = (
        place(mesh, v.reshape(4, 8, -1), None, "data") for v in (layer.x, layer.ids, layer.topk_weights)
    )
    y, load = jax.jit(f)(x, place(mesh, layer.weights, "expert"), ids, topk_weights)
    assert_matches_model(y, layer)
    np.testing.assert_array_equal(load.sum(0), layer.load)


def test_no_derivative():
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer()
    spec = P("expert")
    f = jax.shard_map(mm.moe, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec)
    x, *others = place_all(mesh, layer)
    with pytest.raises(NotImplementedError, match="inference only"):
        jax.grad(lambda x: f(x, *others).astype(jnp.float32).sum())(x)


def test_marks_of_the_results():
    """What `shard_map` is told about the results: y like the tokens, load different on each rank."""
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    tokens, split = P(("data", "expert")), P("expert")
    in_specs = (tokens, split, tokens, tokens)

    def trace(out_specs: Any, specs: Any = in_specs) -> None:
        jax.eval_shape(jax.shard_map(moe_and_load, mesh=mesh, in_specs=specs, out_specs=out_specs), *layer[:4])

    trace((tokens, split))
    for wrong in ((P("data"), split), (split, split), (tokens, P())):
        with pytest.raises(ValueError, match="out_specs"):
            trace(wrong)
    trace((P("data"), split), (P("data"), split, P("data"), P("data")))
    trace((P(), split), (P(), split, P(), P()))


# What XLA makes of it.


@pytest.fixture
def fused_on_cpu(built, cuda_core, monkeypatch):
    """CPU programs with the call in them, to be compiled and read, not to be run."""
    if not cuda_core.has_testing:
        pytest.skip("jax_megamoe._core was built without MEGAMOE_TESTING")
    # Any handler will do that has no state; no other test of the process has CPU programs with this target.
    handler = cuda_core.ffi_registrations()["targets"]["jax_megamoe.read_ceiling.v1"]
    jax.ffi.register_ffi_target(FUSED, handler, platform="cpu")
    monkeypatch.setattr(moe_peers, "_through_collectives", functools.partial(moe_peers._call_kernel, call_id=0))


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("stacked", [False, True], ids=["one layer", "scan over layers"])
@pytest.mark.parametrize("way", ["auto", "explicit", "manual", "data manual", "expert manual"])
def test_weights_are_read_in_place(way, stacked):
    mesh, layer = make_mesh(MESHES["data x expert"], EXPLICIT if way == "explicit" else AUTO), make_layer()
    lead = (None,) if stacked else ()
    weights = mm.stack_experts([packed_weights(0), packed_weights(1)]) if stacked else layer.weights
    function: Any = scan_over_layers if stacked else mm.moe
    manual = {"manual": ("data", "expert"), "data manual": ("data",), "expert manual": ("expert",)}.get(way, ())
    tokens = (*manual, *(axis for axis in ("data", "expert") if axis not in manual))
    x, _, ids, topk_weights = place_all(mesh, layer, tokens=tokens)
    if manual:
        experts = P(*lead, "expert") if "expert" in manual else P()
        specs: Any = {"in_specs": (P(manual), experts, P(manual), P(manual)), "out_specs": P(manual)}
        function = jax.shard_map(function, mesh=mesh, axis_names=set(manual), **specs)
    arguments = x, place(mesh, weights, *lead, "expert"), ids, topk_weights
    text = str(jax.jit(lambda *a: function(*a)).lower(*arguments).compile().as_text())
    # The smaller one of the two FP8 leaves, on one of the four ranks, one layer.
    found = opcodes_of_large_results(text, layer.weights.down.size // 4)
    assert "parameter" in found
    assert found <= {"parameter", "tuple", "get-tuple-element", "while", "bitcast", "call", "custom-call"}, found
    assert text.count(f'custom_call_target="{FUSED}"') == 1
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))


def test_the_layer_by_itself_on_cpus():
    """The primitive's other lowering, directly; tests/test_sharding.py has the rest."""
    mesh, layer = make_mesh(MESHES["expert x model"], AUTO), make_layer()

    def per_device(x: Any, weights: mm.ExpertWeights, ids: Any, topk_weights: Any) -> Any:
        return moe_peers.moe_peers(
            Operands(x, weights.leaves, ids, topk_weights, jnp.int32(0)),
            axis_sizes=mesh.shape,
            expert_axes=("expert",),
            gathered_axes=("expert",),
            timeout_microseconds=1,
            setup_timeout_microseconds=1,
        )

    spec = P("expert")
    f = jax.shard_map(per_device, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec, spec))
    assert_both_match_model(jax.jit(f)(*place_all(mesh, layer)), layer)
