"""What weights of every format do alike: the pytree, files, stacks, meshes, transformations, memory."""

import functools
import io
import json
import pickle
from typing import Any, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe import weight_layout
from jax_megamoe.errors import ArgumentError, DTypeError, LayoutError, ShapeError
from tests.support import numpy_model
from tests.support.cases import exhaustive, one_in
from tests.support.compare import difference
from tests.support.meshes import KINDS

E, H, I = 8, 256, 128
FORMATS: tuple[weight_layout.Format, ...] = get_args(weight_layout.Format)
TOLERANCE = 1e-7

# Dtypes of floats, and intermediate sizes.
INPUTS = {
    "bf16-128": (jnp.bfloat16, 128),
    "bf16-768": (jnp.bfloat16, 768),
    "f16-384": (jnp.float16, 384),
    "f32-128": (jnp.float32, 128),
}

# What goes through layouts, meshes and layers alike is tried with the two formats that differ most.
BETWEEN = exhaustive("fp8_channel")
each_format = pytest.mark.parametrize("format", ["fp8_block", BETWEEN, "mxfp4"])
each_new_format = pytest.mark.parametrize("format", [BETWEEN, "mxfp4"])


@functools.cache
def make_floats(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = ((E, I, H), (E, I, H), (E, H, I))
    return tuple(rng.normal(size=shape).astype(np.float32) * shape[-1] ** -0.5 for shape in shapes)


@functools.cache
def make_weights(format: weight_layout.Format, seed: int = 0) -> mm.ExpertWeights:
    return mm.quantize_experts(*make_floats(seed), format=format)


def make_tokens(num_tokens: int = 16) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(num_tokens, H)), jnp.bfloat16)
    return x, jnp.asarray(rng.integers(-1, E, (num_tokens, 3)), jnp.int32), jnp.asarray(rng.random((num_tokens, 3)))


def assert_same(a: Any, b: Any) -> None:
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        np.testing.assert_array_equal(np.asarray(left).view(np.uint8), np.asarray(right).view(np.uint8))


def make_mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("expert",), axis_types=(kind,), devices=jax.devices("cpu")[:8])


@each_format
def test_shapes_dtypes_and_tags(format):
    weights = make_weights(format)
    leaves = weights.leaves
    assert (weights.format, weights.layout) == (format, weight_layout.LAYOUT_TAGS[format])
    assert tuple(leaf.shape for leaf in leaves) == weight_layout.leaf_shapes(format, E, H, I)
    assert tuple(leaf.dtype for leaf in leaves) == weight_layout.LEAF_DTYPES[format]
    assert weights.nbytes == sum(np.asarray(leaf).nbytes for leaf in leaves)
    assert format in repr(weights) and weights.layout in repr(weights)
    if format != "mxfp4":
        assert f", {format}, " in repr(weights)
    assert_same(mm.pack_experts(*weights.unpack()), weights)
    assert_same(jax.jit(mm.pack_experts)(*jax.jit(lambda w: w.unpack())(weights)), weights)
    stacked = mm.stack_experts([weights, weights])
    seen = []
    jax.jit(lambda w: seen.append(weight_layout.format_of(w.leaves)))(stacked)
    for each in (weights, stacked, jax.tree.map(np.asarray, weights), jax.eval_shape(lambda: weights)):
        seen.append(weight_layout.format_of(each.leaves))
    assert seen == [format] * 5


def test_leaves_of_no_format():
    leaves = make_weights("fp8_block").leaves
    with pytest.raises(LayoutError, match=r"gate_up_scale has shape .*, wanted a last dimension of 4"):
        weight_layout.format_of(leaves._replace(gate_up_scale=leaves.gate_up_scale[..., :3]))


@pytest.mark.parametrize(("order", "format"), one_in(2, ["out_in", "in_out"], FORMATS))
def test_kinds_of_arrays_and_orders_give_the_same_weights(format, order):
    floats: tuple[Any, ...] = make_floats()
    if order == "in_out":
        floats = tuple(np.ascontiguousarray(array.swapaxes(1, 2)) for array in floats)
    quantize = functools.partial(mm.quantize_experts, order=order, format=format)
    wanted = make_weights(format)
    assert_same(quantize(*floats), wanted)
    assert_same(quantize(*map(jnp.asarray, floats)), wanted)
    assert_same(jax.jit(quantize)(*floats), wanted)
    narrow = [array.astype(ml_dtypes.bfloat16) for array in floats]
    assert_same(quantize(*narrow), quantize(*(array.astype(np.float32) for array in narrow)))


@each_format
def test_the_layer_is_that_of_the_numpy_model(format):
    weights, (x, ids, topk_weights) = make_weights(format), make_tokens()
    natural = numpy_model.Experts(*map(np.asarray, weights.unpack()))
    options: dict[str, Any] = {"activation_clamp": 0.5, "routed_scaling_factor": 1.5}
    wanted, load = numpy_model.moe(np.asarray(x), natural, np.asarray(ids), np.asarray(topk_weights), **options)
    for moe in (mm.moe, mm.reference.moe):
        y, found_load = moe(x, weights, ids, topk_weights, return_expert_load=True, **options)
        assert difference(y, wanted) < TOLERANCE
        np.testing.assert_array_equal(found_load, load)


@each_format
def test_files_and_pickles(format):
    weights = make_weights(format)
    file = io.BytesIO()
    saved: dict[str, Any] = {**weights.to_arrays()}
    np.savez(file, **saved)
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        arrays = dict(archive)
    restored = mm.ExpertWeights.from_arrays(arrays)
    assert restored.format == format
    assert_same(restored, weights)
    assert_same(restored.unpack(), weights.unpack())
    for copied in (pickle.loads(pickle.dumps(weights)), mm.ExpertWeights.from_arrays(weights.to_arrays())):
        assert copied.format == format
        assert_same(copied, weights)
    fields = json.loads(arrays["header"].tobytes())
    for other in FORMATS:
        if other == format:
            continue
        header = json.dumps(fields | {"layout": weight_layout.LAYOUT_TAGS[other]}).encode()
        with pytest.raises(LayoutError, match=f"header describes: weights.gate_up.* {other}"):
            mm.ExpertWeights.from_arrays(arrays | {"header": np.frombuffer(header, np.uint8)})


@pytest.mark.parametrize(("num_layers", "format"), one_in(2, [None, 2], FORMATS))
def test_stacks_and_layers(format, num_layers):
    layers, tokens = [make_weights(format, seed) for seed in range(2)], make_tokens()
    x, ids, topk_weights = tokens
    stacked = mm.stack_experts(iter(layers), num_layers=num_layers)
    assert (stacked.format, stacked.num_layers) == (format, 2)
    assert_same([leaf[1] for leaf in stacked.unpack()], layers[1].unpack())
    for index, layer in enumerate(layers):
        wanted = mm.moe(x, layer, ids, topk_weights)
        np.testing.assert_array_equal(mm.moe(x, stacked, ids, topk_weights, layer=index), wanted)
        np.testing.assert_array_equal(jax.jit(mm.moe)(x, stacked, ids, topk_weights, layer=jnp.int32(index)), wanted)


@pytest.mark.parametrize("num_layers", [None, 2])
def test_layers_of_different_formats_are_not_stacked(num_layers):
    layers = [make_weights("mxfp4"), make_weights("fp8_channel")]
    with pytest.raises(LayoutError, match=r"weights\[1\] is fp8_channel, wanted mxfp4 like layer 0"):
        mm.stack_experts(iter(layers), num_layers=num_layers)


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("mxfp4", AxisType.Auto),
        exhaustive("mxfp4", AxisType.Explicit),
        exhaustive("fp8_channel", AxisType.Explicit),
    ],
    ids=["mxfp4-auto", "mxfp4-explicit", "fp8_channel-explicit"],
)
def test_split_experts(format, kind):
    mesh = make_mesh(kind)
    sharding = NamedSharding(mesh, P("expert"))
    weights, tokens = make_weights(format), make_tokens()
    split = mm.quantize_experts(*jax.device_put(make_floats(), sharding), format=format)
    natural = split.unpack()
    repacked = mm.pack_experts(*natural)
    stacked = mm.stack_experts([split, repacked], num_layers=2)
    for each in (split, natural, repacked):
        assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in jax.tree.leaves(each))
    assert_same(split, weights)
    assert_same(repacked, weights)
    assert_same(stacked, mm.stack_experts([weights, weights]))
    wanted = mm.moe(tokens[0], weights, *tokens[1:])
    x, ids, topk_weights = jax.device_put(tokens, sharding)
    assert difference(jax.jit(mm.moe)(x, split, ids, topk_weights), wanted) < 1e-6
    assert difference(jax.jit(mm.moe)(x, stacked, ids, topk_weights, layer=1), wanted) < 1e-6


@each_new_format
@pytest.mark.parametrize(("kind", "check_vma"), one_in(2, KINDS, [True, False], first=1))
def test_weights_made_and_used_on_each_device(format, kind, check_vma):
    mesh = make_mesh(kind)
    shard_map = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=check_vma
    )

    def layer(gate: Any, up: Any, down: Any, x: Any, ids: Any, topk_weights: Any) -> tuple[Any, ...]:
        made = mm.quantize_experts(gate, up, down, format=format, num_experts=E)
        repacked = mm.pack_experts(*made.unpack(), num_experts=E)
        return made, repacked, mm.moe(x, made, ids, topk_weights)

    weights, tokens = make_weights(format), make_tokens()
    arguments = jax.device_put((*make_floats(), *tokens), NamedSharding(mesh, P("expert")))
    made, repacked, y = jax.jit(shard_map(layer))(*arguments)
    assert (made.num_experts, made.format) == (E, format)
    assert_same(made, weights)
    assert_same(repacked, weights)
    assert difference(y, mm.moe(tokens[0], weights, *tokens[1:])) < 1e-6


@each_new_format
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_making_split_weights_moves_nothing_between_devices(format, kind):
    sharding = NamedSharding(make_mesh(kind), P("expert"))

    def types(arrays: Any) -> list[Any]:
        return [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding) for array in arrays]

    quantize = functools.partial(mm.quantize_experts, format=format)
    for make, arrays in ((quantize, make_floats()), (mm.pack_experts, make_weights(format).unpack())):
        text = jax.jit(make).lower(*types(arrays)).compile().as_text()
        assert text is not None
        assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


@each_new_format
def test_vmap_over_layers(format):
    layers = [make_weights(format, seed) for seed in range(2)]
    floats = [jnp.stack(arrays) for arrays in zip(make_floats(0), make_floats(1), strict=True)]
    made = jax.vmap(functools.partial(mm.quantize_experts, format=format))(*floats)
    stacked = mm.stack_experts(layers)
    assert_same(made, stacked)
    assert_same(jax.vmap(mm.pack_experts)(*stacked.unpack()), stacked)
    x, ids, topk_weights = make_tokens()
    y = jax.vmap(lambda w: mm.reference.moe(x, w, ids, topk_weights))(stacked)
    for found, layer in zip(y, layers, strict=True):
        assert difference(found, mm.moe(x, layer, ids, topk_weights)) < TOLERANCE


@each_new_format
@pytest.mark.parametrize(("order", "input"), one_in(2, ["out_in", "in_out"], INPUTS))
def test_quantising_takes_at_most_twice_the_input(format, input, order):
    dtype, i = input
    shapes: list[tuple[int, ...]] = [(4, i, 1024), (4, i, 1024), (4, 1024, i)]
    if order == "in_out":
        shapes = [(e, b, a) for e, a, b in shapes]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    quantize = functools.partial(mm.quantize_experts, order=order, format=format)
    memory = jax.jit(quantize).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert total <= 2 * memory.argument_size_in_bytes


@pytest.mark.parametrize("format", ["fp8", "MXFP4", None, 4])
def test_unknown_formats_are_refused(format):
    with pytest.raises(LayoutError, match="format is .*, wanted one of .*'fp8_block', 'fp8_channel', 'mxfp4'"):
        mm.quantize_experts(*make_floats(), format=format)


def zeros(dtype: Any, *shape: int) -> np.ndarray:
    return np.zeros(shape, dtype)


FP8, E8M0, F32 = numpy_model.FP8, ml_dtypes.float8_e8m0fnu, np.float32
MXFP4 = {
    "gate_up": zeros(np.uint8, E, 2 * I, H // 2),
    "gate_up_scale": zeros(E8M0, E, 2 * I, H // 32),
    "down": zeros(np.uint8, E, H, I // 2),
    "down_scale": zeros(E8M0, E, H, I // 32),
}
CHANNEL = {
    "gate_up": zeros(FP8, E, 2 * I, H),
    "gate_up_scale": zeros(F32, E, 2 * I),
    "down": zeros(FP8, E, H, I),
    "down_scale": zeros(F32, E, H),
}
DEQUANTIZE = "dequantise the weights, .* quantize_experts"
UNFIT: dict[str, tuple[dict[str, Any], dict[str, Any], type[ArgumentError], str]] = {
    "scales of MXFP4 as floats": (
        MXFP4,
        {"down_scale": zeros(F32, E, H, I // 32)},
        DTypeError,
        "down_scale has dtype float32, wanted E8M0 for mxfp4, as float8_e8m0fnu or its bytes in uint8: pass the exponents",
    ),
    "scales of MXFP4 as int8": (
        MXFP4,
        {"gate_up_scale": zeros(np.int8, E, 2 * I, H // 32)},
        DTypeError,
        "gate_up_scale has dtype int8, .*for mxfp4.* pass them as uint8",
    ),
    "NVFP4": (
        MXFP4,
        {"gate_up_scale": zeros(FP8, E, 2 * I, H // 16)},
        DTypeError,
        f"gate_up_scale has dtype float8_e4m3fn, wanted E8M0 for mxfp4.*NVFP4.*{DEQUANTIZE}",
    ),
    "groups of 16": (
        MXFP4,
        {"gate_up_scale": zeros(E8M0, E, 2 * I, H // 16)},
        ShapeError,
        rf"gate_up_scale has shape \(8, 256, 16\), wanted \(8, 256, 8\), that is \[E, 2I, H/32\] of mxfp4: .*{DEQUANTIZE}",
    ),
    "transposed exponents": (
        MXFP4,
        {"down_scale": zeros(np.uint8, E, I // 32, H)},
        ShapeError,
        r"down_scale has shape \(8, 4, 256\), .* of mxfp4: swap its last two dimensions",
    ),
    "matrices of two formats": (
        MXFP4,
        {"down": CHANNEL["down"]},
        DTypeError,
        "gate_up has dtype uint8 and down float8_e4m3fn, wanted one format, FP8 or mxfp4, for both",
    ),
    "another H": (
        MXFP4,
        {"gate_up": zeros(np.uint8, E, 2 * I, H)},
        ShapeError,
        r"gate_up has shape \(8, 256, 256\), wanted \(8, 256, 128\), that is \[E, 2I, H/2\] for down's E, H, I",
    ),
    "I of no multiple": (
        MXFP4,
        {"down": zeros(np.uint8, E, H, I // 4)},
        ShapeError,
        "intermediate size I is 64, wanted a positive multiple of 128",
    ),
    "packed twice": (
        MXFP4,
        {"down": zeros(np.uint8, E, 4, 1, 4352)},
        LayoutError,
        "down has shape .*: this is a packed leaf",
    ),
    "scales of two formats": (
        CHANNEL,
        {"down_scale": zeros(F32, E, H // 128, I // 128)},
        ShapeError,
        r"gate_up_scale has shape \(8, 256\), of fp8_channel and down_scale has shape \(8, 2, 1\), of fp8_block, wanted one",
    ),
    "E8M0 of rows": (
        CHANNEL,
        {"down_scale": zeros(np.uint8, E, H)},
        DTypeError,
        r"down_scale has dtype uint8, wanted float32 or bfloat16 for fp8_channel: pass the powers of two, 2\^\(byte - 127\)",
    ),
    "half precision": (
        CHANNEL,
        {"down_scale": zeros(np.float16, E, H)},
        DTypeError,
        "down_scale has dtype float16, wanted float32 or bfloat16 for fp8_channel: cast it to float32",
    ),
    "MXFP8": (
        CHANNEL,
        {"gate_up_scale": zeros(E8M0, E, 2 * I, H // 32)},
        ShapeError,
        rf"gate_up_scale has shape .* of fp8_block, or \[E, 2I\], \[E, 2I, 1\], \[E, 2\] or \[E\] of fp8_channel.*{DEQUANTIZE}",
    ),
    "gate and up in down": (
        CHANNEL,
        {"down_scale": zeros(F32, E, 2)},
        ShapeError,
        r"down_scale has shape \(8, 2\), wanted .* or \[E, H\], \[E, H, 1\] or \[E\] of fp8_channel",
    ),
}


@pytest.mark.parametrize(("arrays", "replaced", "error", "message"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_packed_is_refused_by_name(arrays, replaced, error, message):
    with pytest.raises(error, match=message):
        mm.pack_experts(**arrays | replaced)


def test_exponents_cast_to_floats_are_refused_as_scales_of_rows_too():
    scale = np.random.default_rng(0).integers(117, 125, (E, H)).astype(np.float32)
    with pytest.raises(DTypeError, match="down_scale holds whole numbers from 117 to 124"):
        mm.pack_experts(**CHANNEL | {"down_scale": scale})


@each_new_format
def test_leaves_that_are_not_those_of_the_format(format):
    weights = make_weights(format)
    wrong = weights.gate_up.view(jnp.int8 if format == "mxfp4" else jnp.uint8)
    as_type = "uint8" if format == "mxfp4" else "float8_e4m3fn"
    message = (
        rf"weights\.gate_up has dtype .*, wanted {as_type}: if it holds .*{format}.*\.view\(jax\.numpy\.{as_type}\)"
    )
    with pytest.raises(DTypeError, match=message):
        mm.ExpertWeights(wrong, *weights.leaves[1:], E, H, I, weights.layout).unpack()
    with pytest.raises(LayoutError, match=rf"weights\.down has shape .* of {format}"):
        mm.ExpertWeights(*weights.leaves[:2], weights.down[:, :1], weights.down_scale, E, H, I, weights.layout).unpack()


def test_quantised_arrays_are_to_be_packed():
    gate = np.zeros((E, I, H), ml_dtypes.float4_e2m1fn)
    with pytest.raises(
        DTypeError, match="gate has dtype float4_e2m1fn, .*MXFP4 weights with their scales go to pack_exp"
    ):
        mm.quantize_experts(gate, gate, gate)
