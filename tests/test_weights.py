"""Packing weights: values, the pytree, and what is refused."""

import contextlib
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe import weight_layout
from jax_megamoe.errors import DTypeError, LayoutError, MegaMoEError, ShapeError
from tests.support import numpy_model
from tests.support.cases import one_in
from tests.support.meshes import KINDS

E, H, I = 4, 256, 384


def as_bytes(array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


def assert_same(a, b) -> None:
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(as_bytes(left), as_bytes(right))


@pytest.fixture(scope="module")
def floats() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((E, I, H), (E, I, H), (E, H, I)))


@pytest.fixture(scope="module")
def natural(floats) -> numpy_model.Experts:
    return numpy_model.quantize_experts(*floats)


@pytest.fixture(scope="module")
def weights(floats) -> mm.ExpertWeights:
    return mm.quantize_experts(*floats)


def test_quantising_equals_the_numpy_model(weights, natural):
    assert_same(weights.unpack(), natural)


def test_a_block_of_zeros_has_scale_one(floats):
    gate, up, down = (array.copy() for array in floats)
    gate[1, :128, 128:], down[2] = 0, 0
    _, gate_up_scale, _, down_scale = mm.quantize_experts(gate, up, down).unpack()
    assert gate_up_scale[1, 0, 1] == 1
    assert (down_scale[2] == 1).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_mxfp4_weights_lose_nothing(dtype):
    rng = np.random.default_rng(1)

    def mxfp4(*shape: int) -> np.ndarray:
        exponents = rng.integers(-9, -4, (*shape[:-1], shape[-1] // 32)).repeat(32, -1)
        return (
            rng.choice([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], shape) * 2.0**exponents
        ).astype(dtype)

    gate, up, down = mxfp4(E, I, H), mxfp4(E, I, H), mxfp4(E, H, I)
    natural = numpy_model.Experts(*map(np.asarray, mm.quantize_experts(gate, up, down).unpack()))
    np.testing.assert_array_equal(
        numpy_model.dequantize(natural.gate_up, natural.gate_up_scale), np.concatenate([gate, up], axis=1).astype(float)
    )
    np.testing.assert_array_equal(numpy_model.dequantize(natural.down, natural.down_scale), down.astype(float))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_quantised_as_the_values_they_are(floats, dtype):
    narrow = [jnp.asarray(array, dtype) for array in floats]
    assert_same(mm.quantize_experts(*narrow), mm.quantize_experts(*(array.astype(jnp.float32) for array in narrow)))


def test_packing_round_trip_is_exact(weights, natural):
    packed = mm.pack_experts(*natural)
    assert (packed.num_experts, packed.hidden_size, packed.intermediate_size) == (E, H, I)
    assert tuple(leaf.shape for leaf in jax.tree.leaves(packed)) == weight_layout.leaf_shapes("fp8_block", E, H, I)
    assert_same(packed, weights)
    assert_same(packed.unpack(), natural)
    assert_same(jax.jit(lambda w: w.unpack())(packed), natural)


def test_bf16_scales_are_widened(natural):
    narrow = natural._replace(
        gate_up_scale=jnp.asarray(natural.gate_up_scale, jnp.bfloat16),
        down_scale=jnp.asarray(natural.down_scale, jnp.bfloat16),
    )
    unpacked = mm.pack_experts(*narrow).unpack()
    assert_same(unpacked[1::2], [narrow.gate_up_scale.astype(jnp.float32), narrow.down_scale.astype(jnp.float32)])


def test_pytree(weights):
    leaves, structure = jax.tree.flatten(weights)
    assert [leaf.dtype for leaf in leaves] == [jnp.float8_e4m3fn, jnp.float32, jnp.float8_e4m3fn, jnp.float32]
    assert_same(jax.tree.unflatten(structure, leaves), weights)
    specs = jax.tree.map(lambda _: P("expert"), weights)
    assert specs.num_experts == E and specs.down == P("expert")
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
    assert names == [".gate_up", ".gate_up_scale", ".down", ".down_scale"]
    abstract = jax.eval_shape(lambda w: w, weights)
    assert abstract.num_experts == E and abstract.down.dtype == jnp.float8_e4m3fn
    assert_same(pickle.loads(pickle.dumps(weights)), weights)


def test_stacked_layers_scan_and_unpack(weights, natural):
    other = jax.tree.map(lambda leaf: leaf[::-1], weights)
    stacked = mm.stack_experts([weights, other])
    assert stacked.is_stacked and not weights.is_stacked and stacked.num_experts == E
    _, per_layer = jax.lax.scan(lambda carry, layer: (carry, layer.unpack()), None, stacked)
    assert_same(per_layer, stacked.unpack())
    assert_same([leaf[0] for leaf in per_layer], natural)
    assert_same([leaf[1] for leaf in per_layer], [leaf[::-1] for leaf in natural])


@pytest.mark.parametrize(("axis_type", "in_context"), one_in(2, KINDS, [True, False]))
def test_sharded_inputs_give_sharded_weights(floats, weights, axis_type, in_context):
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(axis_type,), devices=jax.devices("cpu")[:4])

    def is_split(array: jax.Array, *spec: str | None) -> bool:
        return array.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), array.ndim)

    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        sharded = mm.quantize_experts(*(jax.device_put(array, NamedSharding(mesh, P("expert"))) for array in floats))
        unpacked = jax.jit(lambda w: w.unpack())(sharded)
        eagerly = sharded.unpack()
        packed = mm.pack_experts(*unpacked)
        stacked = mm.stack_experts([sharded, packed])
        unstacked = stacked.unpack()
    for split in (sharded, unpacked, eagerly, packed):
        assert all(is_split(leaf, "expert") for leaf in jax.tree.leaves(split))
    assert all(is_split(leaf, None, "expert") for leaf in jax.tree.leaves((stacked, unstacked)))
    assert_same(sharded, weights)
    assert_same(packed, weights)
    for natural in (unpacked, eagerly, [leaf[1] for leaf in unstacked]):
        assert_same(natural, weights.unpack())


def test_prefix_spec_and_local_leaves_in_shard_map(weights):
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:4])

    def unpack(local: mm.ExpertWeights):
        assert local.gate_up.shape[0] == E // 4 and local.num_experts == E
        return local.unpack()

    mapped = jax.jit(jax.shard_map(unpack, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    assert_same(mapped(weights), weights.unpack())


def test_packing_twice_is_an_error(weights, natural):
    with pytest.raises(LayoutError, match="packed already"):
        mm.pack_experts(weights, *natural[1:])
    with pytest.raises(LayoutError, match="packed already"):
        mm.quantize_experts(weights, weights, weights)
    with pytest.raises(LayoutError, match="packed leaf"):
        mm.pack_experts(weights.gate_up, weights.gate_up_scale, weights.down, weights.down_scale)
    with pytest.raises(LayoutError, match="'sm90_v0'.*'sm90_v1'"):
        dataclasses.replace(weights, layout="sm90_v0")


def f8(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float8_e4m3fn)


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"gate_up": jnp.zeros((E, 2 * I, H))}, DTypeError, "gate_up has dtype float32.*quantize_experts"),
        ({"down": jnp.zeros((E, H, I), jnp.float8_e5m2)}, DTypeError, "down has dtype float8_e5m2"),
        ({"down_scale": jnp.zeros((E, H // 128, I // 128), jnp.int32)}, DTypeError, "down_scale has dtype int32"),
        ({"down": [1.0]}, DTypeError, "down is a list"),
        ({"down": f8(H, I)}, ShapeError, r"down has shape \(256, 384\), wanted \[E, H, I\]"),
        ({"down": f8(E, H, I + 64)}, ShapeError, "intermediate size I is 448, wanted a positive multiple of 128"),
        ({"gate_up": f8(E, I, H)}, ShapeError, r"gate_up has shape \(4, 384, 256\), wanted \(4, 768, 256\)"),
        (
            {"gate_up_scale": jnp.ones((E, 6, 3))},
            ShapeError,
            r"gate_up_scale has shape \(4, 6, 3\), wanted \(4, 6, 2\)",
        ),
        ({"down_scale": jnp.ones((E, 3, 2))}, ShapeError, r"down_scale has shape \(4, 3, 2\), wanted \(4, 2, 3\)"),
    ],
)
def test_unfit_blocks_are_refused_by_name(natural, replaced, error, message):
    with pytest.raises(error, match=message) as caught:
        mm.pack_experts(**{**natural._asdict(), **replaced})
    assert isinstance(caught.value, MegaMoEError) and isinstance(caught.value, ValueError)


def test_unfit_floats_are_refused_by_name(floats):
    gate, up, down = floats
    with pytest.raises(DTypeError, match="gate has dtype float8_e4m3fn.*pack_experts"):
        mm.quantize_experts(jnp.asarray(gate, jnp.float8_e4m3fn), up, down)
    with pytest.raises(DTypeError, match="up has dtype int32"):
        mm.quantize_experts(gate, up.astype(np.int32), down)
    with pytest.raises(ShapeError, match=r"down has shape \(4, 384, 256\), wanted \(4, 256, 384\)"):
        mm.quantize_experts(gate, up, down.swapaxes(1, 2))
    with pytest.raises(ShapeError, match="hidden size H is 192"):
        mm.quantize_experts(gate[..., :192], up[..., :192], down[:, :192])


def test_unfit_stacks_are_refused(weights):
    with pytest.raises(ShapeError, match="empty"):
        mm.stack_experts([])
    with pytest.raises(ShapeError, match=r"weights\[1\] is stacked already"):
        mm.stack_experts([weights, mm.stack_experts([weights])])
    smaller = mm.quantize_experts(jnp.ones((E, 128, H)), jnp.ones((E, 128, H)), jnp.ones((E, H, 128)))
    with pytest.raises(ShapeError, match=r"weights\[1\] has"):
        mm.stack_experts([weights, smaller])
