"""Weights of other experts: the right ones, every bit, wherever they are, without what all devices hold in one place."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, DTypeError, LayoutError, ShapeError, ShardingError
from jax_megamoe.weight_layout import Format
from tests.support.cases import exhaustive
from tests.support.expert_layer import E, H, I, packed_weights
from tests.support.hlo import opcodes_of_large_results
from tests.support.meshes import AUTO, EXPLICIT, MESHES, make_mesh, place

FORMATS: tuple[Format, ...] = ("fp8_block", "fp8_channel", "mxfp4")
MORE = np.array([7, 0, 3, 3, 1, 2, 2, 4, 5, 6, 0, 7, 7, 1, 4, 3], np.int32)
SAME = np.array([7, 0, 3, 3, 1, 2, 2, 4], np.int32)


@functools.cache
def weights_of(format: Format, num_layers: int = 0) -> mm.ExpertWeights:
    rng = np.random.default_rng(num_layers)
    if num_layers:
        return mm.stack_experts([packed_weights(seed) for seed in range(num_layers)])
    floats = (rng.normal(size=shape).astype(np.float32) for shape in ((E, I, H), (E, I, H), (E, H, I)))
    return mm.quantize_experts(*floats, format=format)


def assert_taken(taken: mm.ExpertWeights, weights: mm.ExpertWeights, expert_ids: Any) -> None:
    expert_ids = np.asarray(expert_ids)
    assert (taken.num_experts, taken.layout) == (expert_ids.shape[-1], weights.layout)
    for new, old in zip(taken.leaves, weights.leaves, strict=True):
        old, new = np.asarray(old), np.asarray(new)
        assert old.dtype == new.dtype
        if weights.is_stacked:
            rows = np.broadcast_to(expert_ids, (len(old), expert_ids.shape[-1]))
            wanted = np.stack([layer[row] for layer, row in zip(old, rows, strict=True)])
        else:
            wanted = old[expert_ids]
        np.testing.assert_array_equal(new.view(np.uint8), wanted.view(np.uint8))


@pytest.mark.parametrize("expert_ids", [SAME, MORE, MORE[:3]], ids=["same", "more", "fewer"])
@pytest.mark.parametrize("format", FORMATS)
def test_each_format_on_one_device(format, expert_ids):
    weights = weights_of(format)
    assert_taken(mm.take_experts(weights, expert_ids), weights, expert_ids)
    assert_taken(jax.jit(mm.take_experts)(weights, jnp.asarray(expert_ids)), weights, expert_ids)


@pytest.mark.parametrize(
    "expert_ids", [SAME, MORE, np.stack([SAME, SAME[::-1], SAME + 0])], ids=["same", "more", "own"]
)
def test_stacked_layers(expert_ids):
    weights = weights_of("fp8_block", 3)
    assert_taken(jax.jit(mm.take_experts)(weights, expert_ids), weights, expert_ids)


@pytest.mark.parametrize(
    ("kind", "expert_ids", "num_layers"),
    [
        (AUTO, SAME, 2),
        exhaustive(AUTO, MORE, 0),
        exhaustive(EXPLICIT, SAME, 0),
        (EXPLICIT, MORE, 2),
        ((AUTO, EXPLICIT), MORE, 0),
        ((EXPLICIT, AUTO), SAME, 2),
    ],
    ids=["auto-same-2", "auto-more", "explicit-same", "explicit-more-2", "e-more", "d-same-2"],
)
def test_on_a_mesh(each_platform, kind, expert_ids, num_layers):
    mesh, weights = make_mesh(MESHES["data x expert"], kind), weights_of("fp8_block", num_layers)
    lead = (None,) * (num_layers > 0)
    placed = place(mesh, weights, *lead, "expert")
    for run in (mm.take_experts, jax.jit(mm.take_experts)):
        taken = run(placed, jnp.asarray(expert_ids))
        assert_taken(taken, weights, expert_ids)
        for leaf, old in zip(taken.leaves, placed.leaves, strict=True):
            assert leaf.sharding.is_equivalent_to(old.sharding, leaf.ndim)
            assert jax.typeof(leaf).sharding.spec == jax.typeof(old).sharding.spec


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_two_expert_axes_and_replicated_weights(each_platform, kind):
    mesh, weights = make_mesh({"a": 2, "b": 2, "c": 2}, kind), weights_of("fp8_block")
    placed = place(mesh, weights, ("c", "a"))
    assert_taken(jax.jit(lambda w: mm.take_experts(w, MORE, expert_axis=("c", "a")))(placed), weights, MORE)
    same = place(mesh, weights)
    taken = mm.take_experts(same, SAME, expert_axis=None)
    assert_taken(taken, weights, SAME)
    assert taken.gate_up.sharding.is_fully_replicated


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(each_platform, check_vma):
    mesh, weights = make_mesh(MESHES["data x expert"], AUTO), weights_of("fp8_block", 2)
    spec = P(None, "expert")
    f = jax.shard_map(mm.take_experts, mesh=mesh, in_specs=(spec, P()), out_specs=spec, check_vma=check_vma)
    for expert_ids in (SAME, MORE):
        assert_taken(jax.jit(f)(place(mesh, weights, None, "expert"), expert_ids), weights, expert_ids)
    # Marks tell that a device has all of them, or the caller.
    take: Any = mm.take_experts if check_vma else functools.partial(mm.take_experts, expert_axis=None)
    whole = jax.shard_map(take, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=check_vma)
    assert_taken(jax.jit(whole)(place(mesh, weights), MORE), weights, MORE)
    some = jax.shard_map(
        mm.take_experts, mesh=mesh, in_specs=(P(), P()), out_specs=P(), axis_names={"data"}, check_vma=check_vma
    )
    assert_taken(jax.jit(some)(place(mesh, weights, None, "expert"), MORE), weights, MORE)


def test_memory_is_that_of_donated_weights_and_nothing_is_gathered(each_platform):
    mesh, weights = make_mesh(MESHES["expert"], AUTO), weights_of("fp8_block", 3)
    placed = place(mesh, weights, None, "expert")
    compiled = jax.jit(mm.take_experts, donate_argnums=0).lower(placed, jnp.asarray(SAME)).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == weights.nbytes // mesh.size
    text = str(compiled.as_text())
    assert "all-to-all" in text and "all-gather" not in text
    # An expert for each rank is on its way, of one layer.
    assert not opcodes_of_large_results(text, 3 * E * H * I)


def test_values_of_jax_arrays_are_clamped_and_no_program_is_compiled_anew():
    weights = weights_of("fp8_block")
    run: Any = jax.jit(lambda *arguments: mm.take_experts(*arguments))
    assert_taken(run(weights, jnp.array([-3, 9, 2**31 - 1])), weights, [0, E - 1, E - 1])
    assert_taken(run(weights, jnp.array([4, 4, 0])), weights, [4, 4, 0])
    assert run._cache_size() == 1


def test_what_cannot_be_taken():
    weights = weights_of("fp8_block")
    with pytest.raises(ArgumentError, match="expert_ids has 8, wanted 0 to 7: "):
        mm.take_experts(weights, np.array([0, 8]))
    with pytest.raises(ShapeError, match=r"expert_ids has shape \(2, 3\), wanted \[P\]: "):
        mm.take_experts(weights, np.zeros((2, 3), int))
    with pytest.raises(ShapeError, match=r"expert_ids has shape \(2, 3\), wanted \[P\] or \[3, P\], a row for each"):
        mm.take_experts(weights_of("fp8_block", 3), np.zeros((2, 3), int))
    with pytest.raises(ShapeError, match=r"expert_ids has shape \(0,\)"):
        mm.take_experts(weights, np.zeros(0, int))
    with pytest.raises(DTypeError, match="expert_ids has dtype float32, wanted an integer type: "):
        mm.take_experts(weights, np.zeros(2, np.float32))
    with pytest.raises(LayoutError, match="weights is an array, wanted ExpertWeights: "):
        mm.take_experts(np.zeros(2), np.zeros(2, int))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="weights hold 8 of 9 experts"):
        mm.take_experts(dataclasses.replace(weights, num_experts=9), np.zeros(2, int))


def test_weights_that_count_the_experts_of_one_device_are_refused(eight_devices):
    mesh, weights = make_mesh(MESHES["expert"], AUTO), weights_of("fp8_block")

    def take(own: mm.ExpertWeights) -> mm.ExpertWeights:
        return mm.take_experts(dataclasses.replace(own, num_experts=1), np.zeros(8, int))

    f = jax.shard_map(take, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    with pytest.raises(
        ShapeError, match="weights hold 1 experts on each of 8 devices along 'expert' and say that there"
    ):
        jax.jit(f)(place(mesh, weights, "expert"))


def test_what_a_mesh_does_not_divide(eight_devices):
    mesh, weights = make_mesh(MESHES["expert"], AUTO), weights_of("fp8_block")
    placed = jax.device_put(weights, NamedSharding(mesh, P("expert")))
    with pytest.raises(
        ShapeError, match="expert_ids has 9 experts, wanted a multiple of the 8 devices along 'expert': "
    ):
        mm.take_experts(placed, MORE[:9])
    with pytest.raises(ShardingError, match="expert_axis is 'model' and the mesh has no axis 'model'"):
        mm.take_experts(placed, MORE, expert_axis="model")
