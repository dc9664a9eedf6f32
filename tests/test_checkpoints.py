"""Reading checkpoints: each family and encoding bit by bit against what was written, on one device and on eight."""

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, CheckpointError, ShapeError, ShardingError
from tests.support import numpy_model
from tests.support.cases import exhaustive, one_in
from tests.support.checkpoints import (
    E,
    Encode,
    H,
    I,
    Stock,
    Stored,
    assert_same,
    build,
    fp8_block,
    fp8_channel,
    fp8_matrix,
    mxfp4,
    octets,
    write,
)
from tests.support.families import PLANS
from tests.support.meshes import make_mesh

MADE: dict[str, tuple[Path, Stock]] = {}


@pytest.fixture
def made(tmp_path_factory) -> Any:
    """Folder and contents of each plan's checkpoint, written when it is first asked for."""

    def make(name: str) -> tuple[Path, Stock]:
        if name not in MADE:
            stock = build(PLANS[name])
            MADE[name] = write(tmp_path_factory.mktemp(name), stock.config, stock.tensors), stock
        return MADE[name]

    return make


def stacked(stock: Stock, layers: list[int]) -> numpy_model.Experts:
    return numpy_model.Experts(*(np.stack(parts) for parts in zip(*map(stock.natural, layers), strict=True)))


def quantized_values(stored: Stored) -> np.ndarray[Any, Any]:
    """What a matrix is as FP8 blocks; one that is quantised already as it is."""
    if stored.natural is not None:
        return stored.values
    floats = stored.values.astype(np.float32)[None]
    experts = numpy_model.quantize_experts(floats, floats, floats)
    values: np.ndarray[Any, Any] = numpy_model.dequantize(experts.down, experts.down_scale)[0]
    return values


@pytest.mark.parametrize("name", PLANS)
def test_every_family_comes_back_bit_by_bit(name, made):
    folder, stock = made(name)
    plan = PLANS[name]
    checkpoint = mm.read_checkpoint(folder)
    assert (checkpoint.family, checkpoint.moe_layers) == (stock.family, list(plan.moe_layers))
    assert checkpoint.config["num_hidden_layers"] == plan.num_layers
    layer = plan.moe_layers[-1]
    experts = checkpoint.experts(layer)
    assert_same(experts, stock.natural(layer))
    for bias, expected in zip(experts.unpack_biases(), stock.biases[layer], strict=True):
        np.testing.assert_array_equal(bias, expected)
    router = checkpoint.router(layer)
    for field in ("weight", "bias", "hash_table", "image_bias", "shared_gate", "logit_bias"):
        found, wanted = getattr(router, field), stock.router[layer].get(field)
        assert (found is None) == (wanted is None), field
        if wanted is not None:
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)
    assert router.options == stock.route
    assert checkpoint.moe_options(layer) == stock.moe


ENCODINGS: dict[str, Encode] = {
    **{f"blocks, {scale}": fp8_block(scale) for scale in ("f32", "bf16", "f16", "E8M0", "uint8")},
    **{f"rows, {scale}": fp8_channel(scale, trailing=scale == "f32") for scale in ("f32", "bf16", "f16")},
    **{f"matrices, {scale}": fp8_matrix(scale) for scale in ("f32", "bf16")},
    **{f"{codes}, {powers}": mxfp4(codes, powers) for codes in ("int8", "uint8") for powers in ("E8M0", "uint8")},
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_comes_back_bit_by_bit(name, tmp_path):
    stock = build(dataclasses.replace(PLANS["qwen3-fp8"], encode=ENCODINGS[name]))
    assert_same(mm.load_experts(write(tmp_path, stock.config, stock.tensors), 2), stock.natural(2))


def test_codes_may_have_a_type_of_their_own(tmp_path):
    stock = build(dataclasses.replace(PLANS["qwen3-fp8"], encode=mxfp4("uint8")))
    dtypes = {name: "F4" for name, array in stock.tensors.items() if ".experts." in name and name.endswith(".weight")}
    assert_same(mm.load_experts(write(tmp_path, stock.config, stock.tensors, dtypes=dtypes), 2), stock.natural(2))


def test_the_names_of_the_test_are_all_families_of_the_table():
    from jax_megamoe.checkpoints.families import FAMILIES

    served = {family.name for family in FAMILIES if family.refusal is None}
    assert served == {plan.family for plan in PLANS.values()}


# Of plans whose layers differ in names, encodings or numbers alone, which other tests have, one runs always. gpt-oss:
# tests/test_checkpoint_gpt_oss.py
LIKE_OTHERS = {
    *("deepseek-v3.2", "kimi-k2", "deepseek-v4-base", "deepseek-v4-transformers", "qwen3-fp8", "qwen3.5-bf16"),
    *("qwen3.6-fp8", "glm-4.5-air", "glm-5", "mimo-v2-flash", "hy3-fp8", "hy3-transformers"),
}


@pytest.mark.parametrize(
    "name",
    [exhaustive(n) if n in LIKE_OTHERS else n for n in sorted(set(PLANS) - {"kimi-k3", "gpt-oss"})],
)
def test_a_layer_computes_what_the_checkpoint_means(name, made):
    """Router, options and experts together, against a model in float64 of what was written."""
    folder, stock = made(name)
    checkpoint = mm.read_checkpoint(folder)
    layer = checkpoint.moe_layers[-1]
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((8, H)), jnp.bfloat16)
    router = checkpoint.router(layer)
    ids, weights = mm.route(x.astype(jnp.float32) @ router.weight.T, bias=router.bias, **router.options)
    options = checkpoint.moe_options(layer)
    found = mm.moe(x, checkpoint.experts(layer), ids, weights, **options)
    np.testing.assert_array_equal(found, mm.reference.moe(x, checkpoint.experts(layer), ids, weights, **options))

    experts = stock.natural(layer)  # of floats, what they are quantised to
    gate_up = numpy_model.dequantize_matrices(*experts[:2])
    gate, up, down = gate_up[:, :I], gate_up[:, I:], numpy_model.dequantize_matrices(*experts[2:])
    clamp, factor = options.get("activation_clamp", np.inf), options.get("routed_scaling_factor", 1.0)
    wanted = np.zeros((8, H))
    for token, row in enumerate(np.asarray(x, np.float64)):
        for e, weight in zip(np.asarray(ids[token]), np.asarray(weights[token], np.float64), strict=True):
            g, u = np.minimum(gate[e] @ row, clamp), np.clip(up[e] @ row, -clamp, clamp)
            wanted[token] += factor * weight * (down[e] @ (g / (1 + np.exp(-g)) * u))
    y = np.asarray(found, np.float64)
    difference = 1 - 2 * np.vdot(y, wanted) / (np.vdot(y, y) + np.vdot(wanted, wanted))
    # docs/numerics.md: what is lost by quantising tokens and activations.
    assert difference < 2e-3


def test_a_mesh_without_the_default_axis_gets_all_experts_and_a_warning(made, caplog):
    folder, _ = made("deepseek-v3")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    for axes in ({"expert_axis": "x"}, {"expert_axis": None}):
        mm.load_experts(folder, 1, mesh=mesh, **axes)
    assert not caplog.text
    weights = mm.load_experts(folder, 1, mesh=mesh)
    assert weights.gate_up.is_fully_replicated
    assert "The mesh (x: 8) has no axis 'expert'" in caplog.text and "pass the axis that splits" in caplog.text


def test_experts_of_an_activation_that_is_not_served_come_with_a_warning(made, tmp_path, caplog):
    shutil.copytree(made("kimi-k3")[0], folder := tmp_path / "copy")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"situ"', '"gelu"'))
    mm.load_experts(folder, 1)
    assert "hidden_act = 'gelu', wanted 'silu' or 'situ'" in caplog.text and "loaded all the same" in caplog.text
    with pytest.raises(CheckpointError, match="hidden_act = 'gelu', wanted 'silu' or 'situ'"):
        mm.read_checkpoint(folder).moe_options(1)
    (folder / "config.json").write_text(config.replace("_linear_beta", "_linear"))
    with pytest.raises(CheckpointError, match="has bounds 4.0 and None of its activation, wanted two positive numbers"):
        mm.read_checkpoint(folder).moe_options(1)
    caplog.clear()
    mm.load_experts(made("deepseek-v3")[0], 1)
    assert not caplog.text


def test_experts_that_are_not_loaded_are_not_said_to_be(made, caplog):
    checkpoint = mm.read_checkpoint(made("kimi-k3")[0])
    with pytest.raises(ShardingError, match="no axis"):
        checkpoint.experts(checkpoint.moe_layers[0], mesh=make_mesh({"expert": 8}, AxisType.Auto), expert_axis="ep")
    assert not caplog.records


def test_numbers_of_layers_may_be_numpys(made):
    checkpoint: Any = mm.read_checkpoint(made("deepseek-v3")[0])
    assert checkpoint.experts(np.int64(1)).num_experts == checkpoint.experts(jnp.array(1)).num_experts
    assert checkpoint.experts(layers=np.array([2, 1])).leaves.down.shape[0] == 2


def test_a_router_is_a_pytree(made):
    router = mm.read_checkpoint(made("deepseek-v3")[0]).router(1)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, E)), jnp.float32)
    wanted, found = router.route(logits), jax.jit(lambda router, logits: router.route(logits))(router, logits)
    np.testing.assert_array_equal(found[0], wanted[0])
    doubled = jax.tree.map(lambda leaf: 2 * leaf, router)
    assert doubled.options == router.options and doubled.hash_table is None
    np.testing.assert_array_equal(doubled.bias, 2 * np.asarray(router.bias))


def test_images_are_routed_by_a_bias_of_their_own(made):
    router = mm.read_checkpoint(made("deepseek-v4.1")[0]).router(1)
    biases: dict[str, Any] = {"bias": router.bias, "image_bias": router.image_bias}
    ids, _ = mm.route(jnp.zeros((2, E)), is_image=jnp.array([False, True]), **biases, **router.options)
    for row, bias in zip(ids, biases.values(), strict=True):
        assert set(np.asarray(row)) == set(np.argsort(np.asarray(bias))[-2:])


def test_hash_layers_have_a_table_and_no_bias(made):
    folder, stock = made("deepseek-v4")
    checkpoint = mm.read_checkpoint(folder)
    router = checkpoint.router(0)
    np.testing.assert_array_equal(router.hash_table, stock.router[0]["hash_table"])
    assert router.hash_table is not None and router.hash_table.dtype == jnp.int32 and router.bias is None
    tokens = jnp.arange(4)
    ids, _ = mm.route(jnp.zeros((4, E)), token_ids=tokens, hash_table=router.hash_table, **router.options)
    np.testing.assert_array_equal(ids, stock.router[0]["hash_table"][:4])
    assert checkpoint.router(1).hash_table is None


@pytest.mark.parametrize(
    "name",
    # One of each format, and floats of which one tensor has all experts.
    ["deepseek-v3", exhaustive("qwen3-bf16"), "deepseek-v4", "glm-4.5", exhaustive("hy3-fp8"), "qwen3.5-transposed"],
)
def test_layers_are_stacked(name, made):
    folder, stock = made(name)
    layers = list(PLANS[name].moe_layers)
    everything = mm.load_experts(folder)
    assert everything.num_layers == len(layers)
    assert_same(everything, stacked(stock, layers))
    assert_same(mm.load_experts(folder, layers=layers[::-1]), stacked(stock, layers[::-1]))
    one = mm.load_experts(folder, layer=layers[0])
    assert not one.is_stacked
    assert_same(one, stock.natural(layers[0]))


# Mesh, kind of its axes, and those of the experts.
MESHES: dict[str, tuple[dict[str, int], AxisType, Any]] = {
    "8": ({"expert": 8}, AxisType.Auto, "expert"),
    "4x2": ({"expert": 4, "data": 2}, AxisType.Explicit, "expert"),
    "2x2x2": ({"data": 2, "ep": 2, "tp": 2}, AxisType.Auto, ("ep", "tp")),
    "replicated": ({"data": 4}, AxisType.Auto, None),
}
# How experts are read and where they are put do not know of each other: each family on one mesh.
ALWAYS = {("deepseek-v3", "8"), ("qwen3-bf16", "2x2x2"), ("deepseek-v4", "4x2"), ("glm-4.5", "replicated")}


@pytest.mark.parametrize(
    ("name", "mesh_name"),
    [
        pytest.param(*each, marks=[] if each in ALWAYS else pytest.mark.exhaustive)
        for each in itertools.product(["deepseek-v3", "qwen3-bf16", "deepseek-v4", "glm-4.5"], MESHES)
    ],
)
def test_each_device_gets_its_experts(name, mesh_name, made):
    folder, stock = made(name)
    sizes, kind, axes = MESHES[mesh_name]
    layers = list(PLANS[name].moe_layers)
    mesh = make_mesh(sizes, kind)
    weights = mm.load_experts(folder, mesh=mesh, expert_axis=axes)
    assert isinstance(weights.sharding, NamedSharding) and weights.sharding.spec[:2] in (P(None, axes)[:2], ())
    for leaf in weights.leaves:
        split = 1 if axes is None else np.prod([mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes)])
        assert leaf.addressable_shards[0].data.shape[1] == E // split
    alone = mm.load_experts(folder)
    for found, wanted in zip(weights.leaves, alone.leaves, strict=True):
        np.testing.assert_array_equal(octets(found), octets(wanted))
    one = mm.load_experts(folder, layers[1], mesh=mesh, expert_axis=axes)
    for found, wanted in zip(one.leaves, alone.leaves, strict=True):
        np.testing.assert_array_equal(octets(found), octets(wanted[1]))


@pytest.mark.parametrize("name", [name for name in PLANS if PLANS[name].shared])
def test_shared_experts(name, made):
    folder, stock = made(name)
    plan = PLANS[name]
    checkpoint = mm.read_checkpoint(folder)
    layer = plan.moe_layers[-1]
    shared = checkpoint.shared_experts(layer)
    assert shared is not None
    assert (shared.num_experts, shared.hidden_size, shared.intermediate_size) == (plan.num_shared, plan.model_size, I)
    # Experts of weight 1 each: what the one network computes.
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, plan.model_size)), jnp.bfloat16)
    ids = jnp.tile(jnp.arange(plan.num_shared), (4, 1))
    found = np.asarray(mm.moe(x, shared, ids, jnp.ones(ids.shape)), np.float64)
    gate, up, down = (quantized_values(stored) for stored in stock.shared[layer])
    g, u = np.asarray(x, np.float64) @ gate.T, np.asarray(x, np.float64) @ up.T
    wanted = (g / (1 + np.exp(-g)) * u) @ down.T
    assert 1 - 2 * np.vdot(found, wanted) / (np.vdot(found, found) + np.vdot(wanted, wanted)) < 2e-3
    if stock.shared[layer][0].natural is not None and plan.num_shared == 1:
        gate_n, up_n, down_n = (stored.natural for stored in stock.shared[layer])
        assert gate_n is not None and up_n is not None and down_n is not None
        joined = [np.concatenate([gate_n[n], up_n[n]])[None] for n in range(2)]
        assert_same(shared, numpy_model.Experts(joined[0], joined[1], down_n[0][None], down_n[1][None]))


@pytest.mark.parametrize("name", ["deepseek-v3", "glm-4.5", "deepseek-v4-base"])
def test_two_shared_experts_in_one_network_are_put_apart(name, tmp_path):
    plan = dataclasses.replace(PLANS[name], num_shared=2)
    stock = build(plan)
    shared = mm.read_checkpoint(write(tmp_path, stock.config, stock.tensors)).shared_experts(1)
    assert shared is not None and shared.num_experts == 2
    dequantised = [numpy_model.dequantize_matrices(*map(np.asarray, shared.unpack()[n : n + 2])) for n in (0, 2)]
    gate, up, down = (stored.values for stored in stock.shared[1])
    np.testing.assert_array_equal(dequantised[0][:, :I].reshape(2 * I, H), gate)
    np.testing.assert_array_equal(dequantised[0][:, I:].reshape(2 * I, H), up)
    np.testing.assert_array_equal(np.concatenate(list(dequantised[1]), axis=1), down)


def test_a_shared_experts_mesh_has_all_of_it_everywhere(made):
    mesh = make_mesh({"expert": 8}, AxisType.Auto)
    shared = mm.read_checkpoint(made("deepseek-v3")[0]).shared_experts(1, mesh=mesh)
    assert shared is not None and shared.leaves.down.is_fully_replicated
    assert len(shared.leaves.down.sharding.device_set) == 8


def test_shared_experts_of_several_layers_are_stacked(made, tmp_path):
    folder, stock = made("deepseek-v3")
    checkpoint = mm.read_checkpoint(folder)
    stacked, some = checkpoint.shared_experts(), checkpoint.shared_experts(layers=[2, 1])
    assert stacked is not None and stacked.num_layers == 2 and some is not None
    for i, layer in enumerate(checkpoint.moe_layers):
        one = checkpoint.shared_experts(layer)
        assert one is not None
        for leaf, of_stack, reversed_stack in zip(one.leaves, stacked.leaves, some.leaves, strict=True):
            np.testing.assert_array_equal(octets(of_stack[i]), octets(leaf))
            np.testing.assert_array_equal(octets(reversed_stack[1 - i]), octets(leaf))
    x = jnp.ones((3, H), jnp.bfloat16)
    ids, weights = checkpoint.router(2).route(jnp.zeros((3, E)))
    arguments = {"layer": 1, "shared": stacked, **checkpoint.moe_options(2)}
    y = mm.moe(x, checkpoint.experts(), ids, weights, **arguments)
    np.testing.assert_array_equal(y, mm.reference.moe(x, checkpoint.experts(), ids, weights, **arguments))


def test_families_without_shared_experts_say_none(made):
    assert mm.read_checkpoint(made("qwen3-fp8")[0]).shared_experts(1) is None
    assert mm.read_checkpoint(made("mimo-v2-flash")[0]).shared_experts(2) is None


@pytest.mark.parametrize("name", ["deepseek-v4", "kimi-k3", "mimo-v2.6"])
def test_mxfp4_becomes_fp8_blocks_exactly(name, made):
    folder, stock = made(name)
    layer = PLANS[name].moe_layers[-1]
    weights = mm.load_experts(folder, layer, format="fp8_block")
    gate_up, gate_up_scale, down, down_scale = map(np.asarray, weights.unpack())
    gate, up, wanted_down = stock.values(layer)
    np.testing.assert_array_equal(numpy_model.dequantize(gate_up, gate_up_scale), np.concatenate([gate, up], axis=1))
    np.testing.assert_array_equal(numpy_model.dequantize(down, down_scale), wanted_down)


@pytest.mark.parametrize(("name", "format"), one_in(2, ["qwen3-bf16", "qwen3.5-transposed"], ["fp8_channel", "mxfp4"]))
def test_floats_become_any_format(name, format, made):
    folder, stock = made(name)
    weights = mm.load_experts(folder, 1, format=format)
    parts = [np.stack([one[part].tensors[".weight"] for one in stock.experts[1]]) for part in range(3)]
    wanted = mm.quantize_experts(parts[0], parts[1], parts[2], format=format)
    assert weights.format == format
    for found, leaf in zip(weights.leaves, wanted.leaves, strict=True):
        np.testing.assert_array_equal(octets(found), octets(leaf))


def test_small_blocks_that_mxfp4_cannot_hold(made):
    checkpoint = mm.read_checkpoint(made("deepseek-v4.1")[0])
    assert checkpoint.shared_experts(1, format="fp8_channel").format == "fp8_channel"  # type: ignore[union-attr]


def test_layers_that_were_left_in_floats_become_what_the_others_are(tmp_path):
    """As of checkpoints whose configuration leaves some layers out of quantising."""
    fp8, bf16 = build(PLANS["qwen3-fp8"]), build(PLANS["qwen3-bf16"])
    mixed = {
        name: array
        for stock, layer in ((bf16, 1), (fp8, 2))
        for name, array in stock.tensors.items()
        if f"layers.{layer}." in name
    }
    weights = mm.load_experts(write(tmp_path, fp8.config, mixed))
    assert_same(weights, numpy_model.Experts(*map(np.stack, zip(bf16.natural(1), fp8.natural(2), strict=True))))


def test_without_an_index_all_files_are_read(tmp_path):
    stock = build(PLANS["glm-5"])
    folder = write(tmp_path, stock.config, stock.tensors, num_files=1)
    assert_same(mm.load_experts(folder, 1), stock.natural(1))


@pytest.mark.parametrize("call, error, text", [
    (lambda c: c.experts(0), CheckpointError, r"has no experts in layer 0, wanted one of moe_layers \(1, 2\)"),
    (lambda c: c.experts(3), CheckpointError, "has no experts in layer 3"),
    (lambda c: c.experts("1"), ArgumentError, r"layer is '1', wanted a number of moe_layers \(1, 2\): pass an int"),
    (lambda c: c.experts(1.0), ArgumentError, "layer is 1.0, wanted a number"),
    (lambda c: c.experts(True), ArgumentError, "layer is True, wanted a number"),
    (lambda c: c.experts(np.array([1, 2])), ArgumentError, r"layer is array\(\[1, 2\]\), wanted a number"),
    (lambda c: c.router(None), ArgumentError, "layer is None, wanted a number"),
    (lambda c: c.shared_experts("1"), ArgumentError, "layer is '1', wanted a number"),
    (lambda c: c.moe_options(None), ArgumentError, "layer is None, wanted a number"),
    (lambda c: c.experts(layers=1), ArgumentError, r"layers is 1, wanted a list of numbers .* pass \[layer\] for one"),
    (lambda c: c.experts(layers="12"), ArgumentError, "layers is '12', wanted a list"),
    (lambda c: c.experts(layers=np.array(1)), ArgumentError, r"layers is array\(1\), wanted a list"),
    (lambda c: c.experts(layers=[1, "2"]), ArgumentError, "layers has '2', wanted a number"),
    (lambda c: c.experts(layers=[[1, 2]]), ArgumentError, r"layers has \[1, 2\], wanted a number"),
    (lambda c: c.experts(1, mesh="x"), ShardingError, "mesh is 'x', wanted a jax.sharding.Mesh of devices, or None"),
    (lambda c: c.shared_experts(1, mesh=3), ShardingError, "mesh is 3, wanted a jax.sharding.Mesh"),
    (lambda c: c.router(0), CheckpointError, "has no experts in layer 0"),
    (lambda c: c.experts(1, layers=[1]), ArgumentError, "pass layer, or layers"),
    (lambda c: c.experts(layers=[]), ArgumentError, "layers is empty"),
    (lambda c: c.experts(1, format="int4"), mm.errors.LayoutError, "format is 'int4'"),
    (lambda c: c.experts(1, format="mxfp4"), CheckpointError, r"experts\.0\.gate_proj\.weight' is of FP8 .* wanted what mxfp4"),
    (lambda c: c.experts(1, progress=3), ArgumentError, "progress is 3"),
    (lambda c: c.experts(1, mesh=make_mesh({"expert": 8}, AxisType.Auto), expert_axis="ep"), ShardingError, "no axis"),
    (lambda c: c.experts(1, mesh=Mesh(np.array(jax.devices()[:3]), ("expert",))), ShardingError, "into 3, .* divisor of .* 8"),
])  # fmt: skip
def test_calls_that_cannot_be_served(call, error, text, made):
    with pytest.raises(error, match=text):
        call(mm.read_checkpoint(made("deepseek-v3")[0]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_inside_of_a_mesh_and_with_transfers_forbidden(kind, made):
    folder, stock = made("glm-4.5")
    mesh = make_mesh({"expert": 8}, kind)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        split, alone = mm.load_experts(folder, mesh=mesh), mm.load_experts(folder, 1)
    assert_same(alone, stock.natural(1))
    for found, wanted in zip(split.leaves, alone.leaves, strict=True):
        np.testing.assert_array_equal(octets(found)[0], octets(wanted))


def test_layers_of_different_shapes_are_not_stacked(made, tmp_path):
    stock = build(PLANS["qwen3-bf16"])
    del stock.config["moe_intermediate_size"]  # of all layers
    for e in range(E):
        for name in ("gate_proj", "up_proj"):
            key = f"model.layers.2.mlp.experts.{e}.{name}.weight"
            stock.tensors[key] = np.concatenate([stock.tensors[key]] * 2)
        key = f"model.layers.2.mlp.experts.{e}.down_proj.weight"
        stock.tensors[key] = np.concatenate([stock.tensors[key]] * 2, axis=1)
    checkpoint = mm.read_checkpoint(write(tmp_path, stock.config, stock.tensors))
    with pytest.raises(ShapeError, match="wanted one to stack"):
        checkpoint.experts()
    assert checkpoint.experts(2).intermediate_size == 2 * I


def test_what_it_looks_like(made):
    checkpoint = mm.read_checkpoint(made("deepseek-v3")[0])
    assert repr(checkpoint).endswith("deepseek_v3, experts in layers 1 to 2)")
    assert checkpoint.folder == made("deepseek-v3")[0]
