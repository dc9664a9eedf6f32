"""Weights out of memory and back: their text, pickles, plain arrays, exported programs; the layout's version goes along."""

import copy
import dataclasses
import importlib.resources
import io
import json
import pickle
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import DTypeError, LayoutError, ShapeError
from tests.support import boxes
from tests.support.expert_layer import packed_weights


def assert_same(found: mm.ExpertWeights, wanted: mm.ExpertWeights) -> None:
    assert repr(jax.tree.structure(found)) == repr(jax.tree.structure(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.fixture(scope="module")
def weights() -> mm.ExpertWeights:
    return packed_weights()


@pytest.fixture(scope="module")
def small() -> mm.ExpertWeights:
    return mm.quantize_experts(jnp.ones((8, 128, 256)), jnp.ones((8, 128, 256)), jnp.ones((8, 256, 128)))


def test_text_is_one_line(small):
    assert repr(small) == "ExpertWeights(8 experts, H 256, I 128, fp8_block, sm90_v1, 787.5 kB)"
    stacked = mm.stack_experts([small, small, small])
    assert repr(stacked) == "ExpertWeights(3 layers of 8 experts, H 256, I 128, fp8_block, sm90_v1, 2.4 MB)"
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("expert",), axis_types=(kind,), devices=jax.devices("cpu")[:8])
        split = jax.device_put(small, NamedSharding(mesh, P("expert")))
        assert str(split) == "ExpertWeights(8 experts, H 256, I 128, fp8_block, sm90_v1, 787.5 kB, P('expert'))"
        assert split.sharding == NamedSharding(mesh, P("expert"))
    assert (
        repr(jax.tree.map(lambda _: P(None, "expert"), small))
        == "ExpertWeights(8 experts, H 256, I 128, fp8_block, sm90_v1, P(None, 'expert'))"
    )
    assert repr(jax.tree.map(lambda _: None, small)) == "ExpertWeights(8 experts, H 256, I 128, fp8_block, sm90_v1)"
    assert repr(jax.eval_shape(lambda w: w, small)) == repr(small)
    assert repr(jax.tree.map(np.asarray, small)) == repr(small)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_text_and_properties_while_tracing(small, kind):
    seen = []

    def look(w: mm.ExpertWeights) -> jax.Array:
        seen.append((repr(w), w.nbytes, w.format, w.num_layers, w.is_stacked))
        assert w.sharding is not None
        return w.down_scale

    mesh = jax.make_mesh((8,), ("expert",), axis_types=(kind,), devices=jax.devices("cpu")[:8])
    split = jax.device_put(small, NamedSharding(mesh, P("expert")))
    jax.jit(look)(split)
    jax.jit(jax.shard_map(look, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))(split)
    jax.lax.scan(lambda _, w: (None, look(w)), None, mm.stack_experts([small, small]))
    jax.vmap(look)(mm.stack_experts([small, small]))
    texts, sizes, *others = zip(*seen, strict=True)
    assert texts[0] == repr(split if kind == AxisType.Explicit else small)
    assert texts[1].startswith("ExpertWeights(1 of 8 experts, H 256, I 128, fp8_block, sm90_v1, 98.4 kB")
    assert texts[2] == texts[3] == repr(small)
    assert sizes[0] == 8 * sizes[1] == small.nbytes
    assert [set(other) for other in others] == [{"fp8_block"}, {None}, {False}]


def test_sizes(small):
    stacked = mm.stack_experts([small, small, small])
    assert (small.num_layers, stacked.num_layers) == (None, 3)
    assert small.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(small))
    assert stacked.nbytes == 3 * small.nbytes
    assert small.format == stacked.format == "fp8_block"
    assert jax.tree.map(np.asarray, small).sharding is None


def test_the_package_says_its_version_and_has_types():
    assert mm.__version__[0].isdigit()
    assert (importlib.resources.files(mm) / "py.typed").is_file()


@pytest.mark.parametrize("copied", [lambda w: pickle.loads(pickle.dumps(w)), copy.copy, copy.deepcopy])
def test_pickles_and_copies(weights, copied):
    assert_same(copied(weights), weights)


def test_a_pickle_of_another_layout_is_refused(weights):
    old = pickle.dumps(weights).replace(b"sm90_v1", b"sm90_v0")
    with pytest.raises(LayoutError, match="weights have layout 'sm90_v0', this version wants 'sm90_v1'"):
        pickle.loads(old)


def through_npz(arrays: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        return dict(archive)


@pytest.mark.parametrize("stacked", [False, True])
def test_arrays_in_files_of_numpy(weights, stacked):
    if stacked:
        weights = mm.stack_experts([weights, packed_weights(1)])
    restored = mm.ExpertWeights.from_arrays(through_npz(weights.to_arrays()))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
    assert_same(restored, weights)
    for a, b in zip(restored.unpack(), weights.unpack(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert_same(mm.ExpertWeights.from_arrays(jax.tree.map(jnp.asarray, weights.to_arrays())), weights)


def test_leaves_saved_by_themselves_keep_their_bytes(weights):
    header = weights.to_arrays()["header"]
    leaves = {field: getattr(weights, field) for field in ("gate_up", "gate_up_scale", "down", "down_scale")}
    assert_same(mm.ExpertWeights.from_arrays(through_npz(leaves | {"header": header})), weights)


def header(**fields: object) -> np.ndarray:
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


def test_arrays_of_other_layouts_and_other_arrays_are_refused(weights):
    arrays = weights.to_arrays()
    fields = json.loads(arrays["header"].tobytes())
    for replaced, message in (
        (
            {"header": header(**fields | {"layout": "sm90_v2"})},
            "weights have layout 'sm90_v2', this version wants 'sm90_v1'",
        ),
        (
            {"header": header(**fields | {"hidden_size": 2 * fields["hidden_size"]})},
            "header describes: weights.gate_up has shape",
        ),
        ({"header": header(layout="sm90_v1")}, "header is not that of ExpertWeights"),
        ({"header": np.zeros(7, np.uint8)}, "header is not that of ExpertWeights"),
        ({"down": arrays["down"][:-1]}, "header describes: weights.down has shape"),
        ({"down": np.asarray(arrays["down"], np.float32)}, "down has dtype float32, wanted the bytes"),
        (
            {"down_scale": np.asarray(arrays["down_scale"], np.float16)},
            "header describes: weights.down_scale has dtype float16, wanted float32",
        ),
        ({"header": header(**fields | {"num_experts": 12})}, "header says num_experts=12, wanted a multiple of 8"),
        ({"header": header(**fields | {"num_experts": 0})}, "header is not that of ExpertWeights"),
        ({"header": header(**fields | {"hidden_size": "256"})}, "header is not that of ExpertWeights"),
    ):
        with pytest.raises(LayoutError, match=message):
            mm.ExpertWeights.from_arrays(arrays | replaced)
    with pytest.raises(LayoutError, match="arrays have no header, down, wanted all that to_arrays gave"):
        mm.ExpertWeights.from_arrays({name: arrays[name] for name in arrays if name not in ("header", "down")})


@pytest.mark.parametrize("value", [None, 3, [1, 2]], ids=str)
def test_what_is_no_mapping_is_refused(value):
    with pytest.raises(LayoutError, match=r"arrays is (None|an int|a list), wanted what to_arrays gave"):
        mm.ExpertWeights.from_arrays(value)


@pytest.mark.parametrize("box", boxes.ALL)
def test_weights_with_each_array_in_a_box(weights, box):
    boxed = jax.tree.map(box, weights)
    assert repr(boxed) == repr(weights)
    assert (boxed.nbytes, boxed.sharding) == (weights.nbytes, weights.sharding)
    assert (boxed.is_stacked, boxed.num_layers) == (False, None)
    assert_same(mm.ExpertWeights.from_arrays(boxed.to_arrays()), weights)
    assert_same(mm.ExpertWeights.from_arrays({name: box(a) for name, a in weights.to_arrays().items()}), weights)
    for a, b in zip(boxed.unpack(), weights.unpack(), strict=True):
        np.testing.assert_array_equal(a, b)
    stacked = mm.stack_experts([weights, weights])
    assert_same(mm.stack_experts([boxed, boxed]), stacked)
    assert_same(mm.stack_experts(iter([boxed, boxed]), num_layers=2), stacked)
    assert jax.tree.map(box, stacked).num_layers == 2
    arguments = layer_arguments(weights)
    np.testing.assert_array_equal(mm.moe(arguments[0], boxed, *arguments[2:]), mm.moe(*arguments))


def layer_arguments(weights: mm.ExpertWeights) -> tuple[Any, ...]:
    ids = jnp.arange(8, dtype=jnp.int32).reshape(4, 2) % weights.num_experts
    return jnp.ones((4, weights.hidden_size), jnp.bfloat16), weights, ids, jnp.ones((4, 2))


def test_exported_programs_take_weights(weights):
    pytest.importorskip("flatbuffers")  # jax.export.Exported.serialize wants it
    arguments = layer_arguments(weights)
    written = jax.export.export(jax.jit(mm.moe))(*arguments).serialize()
    program = jax.export.deserialize(written)
    np.testing.assert_array_equal(program.call(*arguments), mm.moe(*arguments))
    with pytest.raises(LayoutError, match="weights have layout 'sm90_v0', this version wants 'sm90_v1'"):
        jax.export.deserialize(bytearray(written.replace(b"sm90_v1", b"sm90_v0")))


def test_exporting_for_gpus_wants_the_published_checks(weights, built):
    arguments = layer_arguments(weights)
    with pytest.raises(ValueError, match="custom calls"):
        jax.export.export(jax.jit(mm.moe), platforms=["cuda"])(*arguments)
    exported = jax.export.export(jax.jit(mm.moe), platforms=["cuda"], disabled_checks=mm.DISABLE_JAX_EXPORT_CHECKS)(
        *arguments
    )
    assert "jax_megamoe.moe.v1" in exported.mlir_module()


def test_numbers_of_experts_are_ints(weights):
    replaced = dataclasses.replace(weights, num_experts=np.int64(8))
    assert type(replaced.num_experts) is int
    assert_same(mm.ExpertWeights.from_arrays(replaced.to_arrays()), weights)
    for number in (8.0, "8", None, True):
        with pytest.raises(ShapeError, match="num_experts of the weights is .*, wanted an int"):
            dataclasses.replace(weights, num_experts=number)


def test_files_are_read_outside_of_programs_and_have_experts(weights):
    arrays = weights.to_arrays()
    with pytest.raises(LayoutError, match="header is traced, wanted its bytes: call from_arrays outside of jax.jit"):
        jax.jit(mm.ExpertWeights.from_arrays)(arrays)
    with pytest.raises(LayoutError, match="gate_up has shape .*, wanted at least one expert"):
        mm.ExpertWeights.from_arrays({name: a if name == "header" else a[:0] for name, a in arrays.items()})


def test_types_instead_of_arrays_are_refused_by_name(weights):
    for method in ("unpack", "to_arrays"):
        with pytest.raises(DTypeError, match=r"weights\.gate_up is a ShapeDtypeStruct, wanted an array"):
            getattr(jax.eval_shape(lambda: weights), method)()
