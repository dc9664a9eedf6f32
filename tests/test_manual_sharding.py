"""The layer inside shard_map: manual axes, alone and beside automatic and explicit ones."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ShapeError
from tests.support.cases import one_in
from tests.support.expert_layer import assert_matches_model, make_layer
from tests.support.meshes import (
    AUTO,
    KINDS,
    MESHES,
    assert_both_match_model,
    make_mesh,
    moe_and_load,
    place,
    place_all,
)

pytestmark = pytest.mark.usefixtures("each_platform")


@pytest.mark.parametrize(("sizes", "kind", "check_vma"), one_in(3, MESHES, KINDS, [True, False]))
def test_manual(sizes, kind, check_vma):
    mesh, layer = make_mesh(sizes, kind), make_layer()
    tokens = tuple(axis for axis in ("data", "expert") if axis in sizes)
    experts = "expert" if "expert" in sizes else None
    f = jax.shard_map(
        moe_and_load,
        mesh=mesh,
        in_specs=(P(tokens), P(experts), P(tokens), P(tokens)),
        out_specs=(P(tokens), P(experts)),
        check_vma=check_vma,
    )
    assert_both_match_model(jax.jit(f)(*place_all(mesh, layer)), layer)


def test_manual_eager():
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    tokens = P(("data", "expert"))
    f = jax.shard_map(mm.moe, mesh=mesh, in_specs=(tokens, P("expert"), tokens, tokens), out_specs=tokens)
    assert_matches_model(f(*place_all(mesh, layer)), layer)


@pytest.mark.parametrize("check_vma", [True, False])
def test_manual_reference(check_vma):
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    tokens = P(("data", "expert"))
    f = jax.shard_map(
        lambda *a: mm.reference.moe(*a, return_expert_load=True),
        mesh=mesh,
        in_specs=(tokens, P("expert"), tokens, tokens),
        out_specs=(tokens, P("expert")),
        check_vma=check_vma,
    )
    assert_both_match_model(jax.jit(f)(*place_all(mesh, layer)), layer)


@pytest.mark.parametrize(("check_vma", "tokens"), one_in(2, [True, False], [P(), P("data")]))
def test_manual_with_tokens_replicated_over_the_expert_axis(check_vma, tokens):
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    axes = tuple(axis for axis in ("data",) if tokens)
    f = jax.shard_map(
        lambda *a: mm.moe(*a, return_expert_load=True, token_axes=axes),
        mesh=mesh,
        in_specs=(tokens, P("expert"), tokens, tokens),
        out_specs=(tokens, P("expert")),
        check_vma=check_vma,
    )
    assert_both_match_model(jax.jit(f)(*place_all(mesh, layer, tokens=None)), layer)


def test_manual_with_replicated_weights():
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer()
    spec = P("expert")
    f = jax.shard_map(moe_and_load, mesh=mesh, in_specs=(spec, P(), spec, spec), out_specs=(spec, P()))
    assert_both_match_model(jax.jit(f)(*place_all(mesh, layer, experts=None)), layer)


def test_wrong_out_specs_are_refused():
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer()
    spec = P("expert")
    f = jax.shard_map(mm.moe, mesh=mesh, in_specs=(spec, spec, spec, spec), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(f)(*place_all(mesh, layer))


def mapped_over(axis: str, mesh: Mesh, check_vma: bool) -> Callable[..., Any]:
    """The layer in a region that is manual over one axis of two."""
    experts = P("expert") if axis == "expert" else P()
    return jax.shard_map(
        moe_and_load,
        mesh=mesh,
        in_specs=(P(axis), experts, P(axis), P(axis)),
        out_specs=(P(axis), experts),
        axis_names={axis},
        check_vma=check_vma,
    )


@pytest.mark.parametrize(("check_vma", "kind", "axis"), one_in(2, [True, False], KINDS, ["data", "expert"]))
def test_some_axes_manual(axis, kind, check_vma):
    mesh, layer = make_mesh(MESHES["data x expert"], kind), make_layer()
    (other,) = {"data", "expert"} - {axis}
    f = jax.jit(mapped_over(axis, mesh, check_vma))
    assert_both_match_model(f(*place_all(mesh, layer, tokens=(axis, other))), layer)


@pytest.mark.parametrize(("check_vma", "axis"), one_in(2, [True, False], ["data", "expert"]))
def test_some_axes_manual_eager(axis, check_vma):
    if not check_vma and jax.__version_info__ < (0, 12):
        pytest.skip("jax 0.11 takes no array that is split over automatic axes there, whatever the function is")
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    assert_both_match_model(mapped_over(axis, mesh, check_vma)(*place_all(mesh, layer)), layer)


def test_vmap_inside_and_outside_of_shard_map():
    mesh, layer = make_mesh(MESHES["expert"], AUTO), make_layer(32)
    spec, weights = P(None, "expert"), place(mesh, layer.weights, "expert")
    x, ids, topk_weights = (
        place(mesh, v.reshape(4, 8, -1), None, "expert") for v in (layer.x, layer.ids, layer.topk_weights)
    )
    inside = jax.shard_map(
        jax.vmap(mm.moe, in_axes=(0, None, 0, 0)), mesh=mesh, in_specs=(spec, P("expert"), spec, spec), out_specs=spec
    )
    assert_matches_model(jax.jit(inside)(x, weights, ids, topk_weights), layer)
    spec = P("expert")
    outside = jax.vmap(
        jax.shard_map(mm.moe, mesh=mesh, in_specs=(spec, spec, spec, spec), out_specs=spec), in_axes=(0, None, 0, 0)
    )
    assert_matches_model(jax.jit(outside)(x, weights, ids, topk_weights), layer)


@pytest.mark.usefixtures("eight_devices")
def test_wrong_share_of_the_experts_in_shard_map():
    mesh, layer = make_mesh(MESHES["data x expert"], AUTO), make_layer()
    tokens = P(("data", "expert"))
    f = jax.shard_map(mm.moe, mesh=mesh, in_specs=(tokens, P(("data", "expert")), tokens, tokens), out_specs=tokens)
    with pytest.raises(ShapeError, match="weights hold 1 experts on each device, wanted 8 / 4"):
        jax.jit(f)(*place_all(mesh, layer, experts=("data", "expert")))
