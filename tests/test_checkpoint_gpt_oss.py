"""gpt-oss: rows in turn, biases, sizes that are no multiples of 128, and a layer in float64 that shares no code."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from examples.expectations import gpt_oss_layer
from jax_megamoe.checkpoints import convert
from jax_megamoe.errors import CheckpointError, ShapeError
from tests.support import numpy_model
from tests.support.cases import one_in
from tests.support.checkpoints import E, K, Named, Plan, Stock, Stored, build, octets, write
from tests.support.compare import difference
from tests.support.families import PLANS
from tests.support.meshes import make_mesh
from tests.support.numpy_model import Array

PLAN = PLANS["gpt-oss"]
H, I = PLAN.hidden_size, PLAN.intermediate_size
STEM = "model.layers.1.mlp"


def large_floats(rng: np.random.Generator, n: int, k: int) -> Stored:
    values = (16 * rng.standard_normal((n, k)) / k**0.5).astype(ml_dtypes.bfloat16)
    return Stored({".weight": values}, None, values.astype(np.float64))


IN_FLOATS = dataclasses.replace(PLAN, encode=large_floats)
LAYER = 1


def made(folder: Path, plan: Plan = PLAN) -> tuple[Path, Stock]:
    stock = build(plan)
    return write(folder, stock.config, stock.tensors), stock


def chosen(logits: Array, top_k: int) -> tuple[Array, Array]:
    """The experts of the largest logits [T, E], and the softmax over these alone."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    powers = np.exp(np.take_along_axis(logits, ids, 1) - logits.max(1, keepdims=True))
    return ids, powers / powers.sum(1, keepdims=True)


def layer_of(x: Array, gate_up: Array, down: Array, gate_up_bias: Array, down_bias: Array, *routed: Array) -> Array:
    """gpt-oss' formula in float64: x [T, H], gate_up [E, 2I, H] with rows in turn, down [E, H, I], ids and weights."""
    ids, w = routed
    y = np.zeros(x.shape)
    for token, row in enumerate(x.astype(np.float64)):
        for e, weight in zip(ids[token], w[token], strict=True):
            both = gate_up[e] @ row + gate_up_bias[e]
            gate, up = np.minimum(both[0::2], 7), np.clip(both[1::2], -7, 7)
            y[token] += weight * (down[e] @ (gate / (1 + np.exp(-1.702 * gate)) * (up + 1)) + down_bias[e])
    return y


def values(tensors: Named, name: str) -> Array:
    """The exact numbers of a tensor of all experts, as a checkpoint of either kind holds them."""
    if f"{name}_blocks" in tensors:
        blocks = tensors[f"{name}_blocks"]
        return numpy_model.dequantize_mxfp4(blocks.reshape(*blocks.shape[:2], -1), tensors[f"{name}_scales"])
    return tensors[name].astype(np.float64).swapaxes(1, 2)


def computed(tensors: Named, x: Array, ids: Array, weights: Array, stem: str = STEM) -> Array:
    gate_up, down = (values(tensors, f"{stem}.experts.{name}") for name in ("gate_up_proj", "down_proj"))
    biases = (tensors[f"{stem}.experts.{name}_bias"].astype(np.float64) for name in ("gate_up_proj", "down_proj"))
    return layer_of(x, gate_up, down, *biases, ids, weights)


def tokens(count: int = 8) -> Array:
    # Products are of the biases' size, and beyond the bounds of the activation now and then.
    return (np.random.default_rng(1).standard_normal((count, H)) / 4).astype(ml_dtypes.bfloat16)


def run(checkpoint: mm.checkpoints.Checkpoint, x: Array, layer: int = LAYER, **options: Any) -> Any:
    """Ids, weights and result, as docs/checkpoints.md says to call it."""
    router = checkpoint.router(layer)
    logits = jnp.matmul(x.astype(np.float32), router.weight.T, precision="highest")
    ids, weights = router.route(logits)
    experts = checkpoint.experts(layer, **options)
    return ids, weights, mm.moe(jnp.asarray(x), experts, ids, weights, **checkpoint.moe_options(layer))


# What is lost by quantising tokens and activations (docs/numerics.md), here 6e-4; then by FP8 and by MXFP4 weights, too.
@pytest.mark.parametrize("plan, format, bound", [
    (PLAN, None, 2e-3), (IN_FLOATS, None, 3e-3), (IN_FLOATS, "mxfp4", 3e-2)
], ids=["mxfp4", "floats", "floats to mxfp4"])  # fmt: skip
def test_a_layer_computes_what_the_model_does(plan, format, bound, tmp_path):
    folder, stock = made(tmp_path, plan)
    x = tokens()
    ids, weights, y = run(mm.read_checkpoint(folder), x, format=format)
    router = stock.router[LAYER]
    wanted_ids, wanted_weights = chosen(x.astype(np.float64) @ router["weight"].T + router["logit_bias"], K)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_allclose(weights, wanted_weights, rtol=1e-4, atol=1e-6)
    wanted = computed(stock.tensors, x, wanted_ids, wanted_weights)
    assert y.shape == x.shape and difference(y, wanted) < bound
    # Each part of the formula is felt.
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        other = {**stock.tensors, f"{STEM}.experts.{name}": 0 * stock.tensors[f"{STEM}.experts.{name}"]}
        assert difference(y, computed(other, x, wanted_ids, wanted_weights)) > 3 * difference(y, wanted)


def test_it_agrees_with_transformers(tmp_path):
    expected = json.loads(Path(gpt_oss_layer.__file__).with_suffix(".json").read_text())
    # If it differs, so does the checkpoint from that which the expectations are of: make them anew.
    assert gpt_oss_layer.write(tmp_path / "mxfp4") == expected["checkpoint_sha256"]
    gpt_oss_layer.write(tmp_path / "floats", is_float=True)
    x, wanted = gpt_oss_layer.tokens(), np.array(expected["y"])
    for folder in ("mxfp4", "floats"):
        tensors = gpt_oss_layer.tensors(is_float=folder == "floats")
        np.testing.assert_allclose(
            computed(tensors, x, np.array(expected["ids"]), np.array(expected["weights"]), gpt_oss_layer.STEM),
            wanted,
            atol=2e-4,  # digits that were kept
        )
        ids, weights, y = run(mm.read_checkpoint(tmp_path / folder), x, layer=0, format="mxfp4")
        np.testing.assert_array_equal(ids, expected["ids"])
        np.testing.assert_allclose(weights, expected["weights"], atol=2e-5)
        assert difference(y, wanted) < 2e-3


@pytest.mark.parametrize("format", [None, "fp8_channel", "mxfp4"])
def test_floats_become_what_quantize_experts_makes(format, tmp_path):
    folder, stock = made(tmp_path, IN_FLOATS)
    weights = mm.load_experts(folder, LAYER, format=format)
    assert (weights.format, weights.hidden_size, weights.intermediate_size) == (format or "fp8_channel", H, I)
    gate_up_bias, down_bias = stock.biases[LAYER]
    parts = [np.stack([one[part].tensors[".weight"] for one in stock.experts[LAYER]]) for part in range(3)]
    wanted = mm.quantize_experts(
        *parts, format=weights.format, gate_up_bias=gate_up_bias, down_bias=down_bias, pad=True
    )
    for found, leaf in zip(weights.leaves, wanted.leaves, strict=True):
        np.testing.assert_array_equal(octets(found), octets(leaf))


def test_floats_may_have_either_order(tmp_path):
    folder, stock = made(tmp_path / "in_out", IN_FLOATS)
    tensors = {
        name: np.ascontiguousarray(array.swapaxes(1, 2)) if name.endswith(("gate_up_proj", "down_proj")) else array
        for name, array in stock.tensors.items()
    }
    other = mm.load_experts(write(tmp_path / "out_in", stock.config, tensors))
    for found, leaf in zip(mm.load_experts(folder).leaves, other.leaves, strict=True):
        np.testing.assert_array_equal(octets(found), octets(leaf))


@pytest.mark.parametrize(
    ("plan", "sizes"),
    one_in(2, {"mxfp4": PLAN, "floats": IN_FLOATS}, {"8": {"expert": 8}, "2x4": {"data": 2, "expert": 4}}),
)
def test_each_device_gets_its_experts(plan, sizes, tmp_path):
    folder, _ = made(tmp_path, plan)
    mesh = make_mesh(sizes, AxisType.Auto)
    weights, alone = mm.load_experts(folder, mesh=mesh, expert_axis="expert"), mm.load_experts(folder)
    assert isinstance(weights.sharding, NamedSharding) and weights.num_layers == 2
    for found, wanted in zip(weights.leaves, alone.leaves, strict=True):
        assert found.addressable_shards[0].data.shape[1] == E // sizes["expert"]
        np.testing.assert_array_equal(octets(found), octets(wanted))
    one = mm.load_experts(folder, LAYER)
    for found, wanted in zip(one.leaves, alone.leaves, strict=True):
        np.testing.assert_array_equal(octets(found), octets(wanted[1]))


@pytest.mark.parametrize("plan, one_expert", [
    (PLAN, 3 * I * H // 2 + 3 * I * H // 32 + 2 * (2 * I + H)),
    (IN_FLOATS, 2 * (3 * I * H + 2 * I + H)),
], ids=["mxfp4", "floats"])  # fmt: skip
def test_a_function_is_told_bytes(plan, one_expert, tmp_path):
    calls: list[tuple[int, int]] = []
    mm.load_experts(made(tmp_path, plan)[0], LAYER, progress=lambda *call: calls.append(call))
    assert calls == [(n * one_expert, E * one_expert) for n in range(1, E + 1)]


def test_experts_are_views_of_the_file(tmp_path):
    layer = mm.read_checkpoint(made(tmp_path)[0])._model.layer(LAYER)
    raw: Any = layer.read(3, 1)
    # Of biases BF16 may lie at an odd place, where it has to be copied.
    assert not any(array.flags.owndata or array.flags.writeable for array in raw[:6])
    assert raw.gate_bias.shape == (1, I) and np.may_share_memory(raw.gate, raw.up)


@pytest.mark.parametrize("plan", [PLAN, IN_FLOATS], ids=["mxfp4", "floats"])
def test_a_cache_is_read_like_the_checkpoint(plan, tmp_path):
    folder, stock = made(tmp_path / "stock", plan)
    cached = mm.read_checkpoint(convert(folder, tmp_path / "cache"))
    for found, wanted in zip(cached.experts().leaves, mm.load_experts(folder).leaves, strict=True):
        np.testing.assert_array_equal(octets(found), octets(wanted))
    experts = cached.experts(LAYER)
    assert (experts.hidden_size, experts.intermediate_size) == (H, I)
    for bias, written in zip(experts.unpack_biases(), stock.biases[LAYER], strict=True):
        np.testing.assert_array_equal(bias, written)
    np.testing.assert_array_equal(cached.router(LAYER).logit_bias, stock.router[LAYER]["logit_bias"])
    assert cached.moe_options(LAYER) == PLAN.moe
    for found, wanted in zip(run(cached, tokens()), run(mm.read_checkpoint(folder), tokens()), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_configuration_may_say_less_or_more(tmp_path):
    stock = build(PLAN)
    for name in ("swiglu_limit", "num_experts_per_tok"):
        del stock.config[name]
    checkpoint = mm.read_checkpoint(write(tmp_path / "less", stock.config, stock.tensors))
    assert checkpoint.moe_options(LAYER) == PLAN.moe and checkpoint.router(LAYER).options["top_k"] == K
    stock.config |= {"swiglu_limit": 5.0, "swiglu_alpha": 1.5}
    checkpoint = mm.read_checkpoint(write(tmp_path / "more", stock.config, stock.tensors))
    assert checkpoint.moe_options(LAYER) == {"activation": mm.SwiGLU(1.5, 1.0), "activation_clamp": 5.0}
    stock.config["swiglu_alpha"] = float("inf")
    checkpoint = mm.read_checkpoint(write(tmp_path / "wrong", stock.config, stock.tensors))
    with pytest.raises(CheckpointError, match="has alpha = inf, wanted a finite number"):
        checkpoint.moe_options(LAYER)


def test_the_bias_of_logits(tmp_path):
    router = mm.read_checkpoint(made(tmp_path)[0]).router(LAYER)
    assert router.bias is None and router.logit_bias is not None
    logits = np.random.default_rng(0).standard_normal((3, 2, E)).astype(np.float32)
    wanted = mm.route(logits + np.asarray(router.logit_bias), **router.options)
    for given in (logits, jnp.asarray(logits), logits.astype(np.float64)):
        for found, array in zip(router.route(given), wanted, strict=True):
            np.testing.assert_array_equal(found, array)
    for found, array in zip(jax.jit(lambda r, z: r.route(z))(router, logits), wanted, strict=True):
        np.testing.assert_allclose(found, array, rtol=1e-6)
    half = jnp.asarray(logits, jnp.bfloat16)
    in_f32 = mm.route(np.asarray(half, np.float32) + np.asarray(router.logit_bias), **router.options)
    np.testing.assert_array_equal(router.route(half)[1], in_f32[1])
    mesh = make_mesh({"data": 8}, AxisType.Explicit)
    with jax.set_mesh(mesh):
        split = jax.device_put(np.zeros((8, E), np.float32), NamedSharding(mesh, P("data")))
        ids = np.asarray(router.route(split)[0])
    np.testing.assert_array_equal(ids[0], np.argsort(-np.asarray(router.logit_bias))[:K])
    with pytest.raises(ShapeError, match=r"logits has shape \(3, 7\), wanted \[\.\.\., 8\]"):
        router.route(logits[:, 0, :7])
    with pytest.raises(mm.errors.DTypeError, match="logits has dtype int32"):
        router.route(np.zeros((3, E), np.int32))


Change = Callable[[Named], object]
GATE_UP, DOWN = f"{STEM}.experts.gate_up_proj", f"{STEM}.experts.down_proj"


def without(name: str) -> Change:
    return lambda held: held.pop(name)


def changed(name: str, change: Callable[[Array], Array], new: str | None = None) -> Change:
    return lambda held: held.update({new or name: change(held[name])})


REFUSALS: dict[str, tuple[Plan, Change, str]] = {
    "bias missing": (PLAN, without(f"{GATE_UP}_bias"), r"gate_up_proj_bias' is missing"),
    "bias of down missing": (IN_FLOATS, without(f"{DOWN}_bias"), r"down_proj_bias' is missing"),
    "bias of another size": (
        PLAN, changed(f"{GATE_UP}_bias", lambda a: a[:, :I]), r"_bias' is BF16 \(8, 160\), wanted floats \[8, 320\]"
    ),
    "bias of bytes": (PLAN, changed(f"{DOWN}_bias", lambda a: a.view(np.uint16).astype(np.uint8)), r"down_proj_bias' is U8 \(8, 224\)"),
    "two biases": (PLAN, changed(f"{DOWN}_bias", lambda a: a, f"{DOWN}.bias"), r"down_proj\.bias' is beside '.*_bias', wanted one"),
    "blocks missing": (PLAN, without(f"{GATE_UP}_blocks"), r"gate_up_proj_blocks' is missing"),
    "floats missing": (IN_FLOATS, without(GATE_UP), r"gate_up_proj' is missing"),
    "scales missing": (PLAN, without(f"{DOWN}_scales"), r"down_proj_blocks' is U8 \(8, 224, 80\) without a scale"),
    "scales of another size": (
        PLAN, changed(f"{DOWN}_scales", lambda a: a[:, :, :3]), r"down_proj_blocks' is U8 .* with a scale U8 \(8, 224, 3\) \('.*_scales'\)"
    ),
    "scales of fewer experts": (PLAN, changed(f"{DOWN}_scales", lambda a: a[1:]), r"down_proj_scales' has shape .* wanted 8 experts"),
    "blocks of another size": (
        PLAN, changed(f"{DOWN}_blocks", lambda a: a.reshape(E, H, -1, 8)), r"_blocks' is U8 \(8, 224, 10, 8\), wanted U8 \[\.\.\., 16\]"
    ),
    "blocks of floats": (PLAN, changed(f"{DOWN}_blocks", lambda a: a.astype(np.float32)), r"_blocks' is F32 .*, wanted U8"),
    "both forms": (
        PLAN, lambda held: held.update({DOWN: np.zeros((E, I, H), ml_dtypes.bfloat16)}), r"down_proj_blocks' is beside '.*down_proj', wanted one"
    ),
    "an exponent of NaN": (
        PLAN, changed(f"{DOWN}_scales", lambda a: np.where(np.arange(E)[:, None, None] == 3, np.uint8(255), a)),
        r"down_proj_blocks' has an exponent of 255, which is NaN, in row 0 of expert 3's down",
    ),
    "scales that rows share": (
        IN_FLOATS,
        lambda held: held.update({
            GATE_UP: np.zeros((E, 2 * I, H), ml_dtypes.float8_e4m3fn),
            f"{GATE_UP}_scale": np.ones((E, I // 16, H // 32), np.uint8),
        }),
        r"gate_up_proj' has scales that rows of gate share with rows of up",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_experts_that_cannot_be_loaded(name, tmp_path):
    plan, change, text = REFUSALS[name]
    stock = build(plan)
    change(stock.tensors)
    checkpoint = mm.read_checkpoint(write(tmp_path, stock.config, stock.tensors))
    with pytest.raises(CheckpointError, match=text) as caught:
        checkpoint.experts(LAYER)
    assert caught.value.tensor is not None and str(caught.value).endswith(".")


@pytest.mark.parametrize("plan, advice", [(PLAN, "mxfp4"), (IN_FLOATS, "fp8_channel")], ids=["mxfp4", "floats"])
def test_blocks_have_no_place_for_biases(plan, advice, tmp_path):
    folder, _ = made(tmp_path / "stock", plan)
    text = rf"gate_up_proj_bias' is a bias, which fp8_block has no place for, .*: load it with format='{advice}'\."
    with pytest.raises(CheckpointError, match=text):
        mm.load_experts(folder, LAYER, format="fp8_block")
    with pytest.raises(CheckpointError, match=text):
        convert(folder, tmp_path / "cache", format="fp8_block")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("change, text", [
    (without(f"{STEM}.router.bias"), r"router\.bias' is missing"),
    (without(f"{STEM}.router.weight"), r"router\.weight' is missing"),
    (changed(f"{STEM}.router.bias", lambda a: a[:3]), r"router\.bias' is BF16 \(3,\), wanted floats \[8\]"),
])  # fmt: skip
def test_routers_that_cannot_be_loaded(change, text, tmp_path):
    stock = build(PLAN)
    change(stock.tensors)
    checkpoint = mm.read_checkpoint(write(tmp_path, stock.config, stock.tensors))
    with pytest.raises(CheckpointError, match=text):
        checkpoint.router(LAYER)
