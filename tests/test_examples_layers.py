"""The layers of `examples` in the classes and by the names of frameworks, the benchmark and the command line."""

import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from examples import bench_decode, deepseek_v4, qwen3_moe, random_models, whole_layer
from examples.expectations import gpt_oss_layer, layers, tiny
from jax_megamoe.checkpoints import convert
from tests.support.cases import exhaustive
from tests.support.checkpoints import build, write
from tests.support.compare import difference
from tests.support.families import PLANS
from tests.support.meshes import make_mesh
from tests.support.numpy_model import Array

# What quantising tokens and activations leaves (docs/numerics.md) was 1.1e-3; times three. Without a router's bias it is
# 1.3e-2 and more, without shared experts 0.5.
BOUND = 3e-3
EXPECTED = json.loads(Path(layers.__file__).with_suffix(".json").read_text())
CHECKPOINTS = [*layers.LAYERS, "gpt_oss"]
WAYS = ("plain", "nnx", "nnx split", "equinox", "equinox mapped")


class Wanted(NamedTuple):
    """A checkpoint of an expert layer, and what `transformers` computes of it."""

    folder: Path
    layer: int
    x: jax.Array
    token_ids: jax.Array | None
    y: Array
    kept: Callable[[Any], Array]


# Of those, what others do not have: shared experts and groups; a table; a gate.
FEW = pytest.mark.parametrize(
    "wanted",
    [name if name in ("deepseek_v3", "deepseek_v4_hash", "qwen3_5_moe") else exhaustive(name) for name in CHECKPOINTS],
    indirect=True,
    scope="module",
)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def wanted(request, tmp_path_factory) -> Wanted:
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    if request.param == "gpt_oss":
        expected = json.loads(Path(gpt_oss_layer.__file__).with_suffix(".json").read_text())
        digest, layer, x, ids = gpt_oss_layer.write(folder), 0, gpt_oss_layer.tokens(), None
        kept: Callable[[Any], Array] = np.asarray
    else:
        write, layer = layers.LAYERS[request.param]
        expected, digest, x = EXPECTED[request.param], write(folder), layers.tokens()
        kept = layers.kept
        ids = jnp.array(layers.TOKEN_IDS) if "hash" in request.param else None
    # If it differs, so does the checkpoint from that which the expectations are of: make them anew.
    assert digest == expected["checkpoint_sha256"]
    return Wanted(folder, layer, jnp.asarray(x), ids, np.array(expected["y"]), kept)


def run(way: str, wanted: Wanted, folder: Path | None = None, mesh: Mesh | None = None) -> Any:
    """The layer by itself, or in the class of a framework, jitted."""
    arguments = [] if wanted.token_ids is None else [wanted.token_ids]
    where = folder or wanted.folder, wanted.layer, mesh
    if way == "plain":
        arrays, options = whole_layer.read_layer(*where)
        return jax.jit(lambda arrays, *a: whole_layer.apply_layer(arrays, options, *a))(arrays, wanted.x, *arguments)
    package, module = ("flax", "flax_nnx_layer") if "nnx" in way else ("equinox", "equinox_layer")
    framework = pytest.importorskip(package, reason="needs the framework, which nothing else here does")
    layer = importlib.import_module(f"examples.{module}").ExpertLayer.from_checkpoint(*where)
    if package == "equinox":
        if "mapped" not in way:
            return framework.filter_jit(layer)(wanted.x, *arguments)
        return framework.filter_jit(lambda layer, *a: jax.vmap(layer)(*a))(layer, wanted.x, *arguments)
    nnx = importlib.import_module("flax.nnx")
    if "split" not in way:
        return nnx.jit(lambda layer, *a: layer(*a))(layer, wanted.x, *arguments)
    definition, state = nnx.split(layer)
    return jax.jit(lambda state, *a: nnx.merge(definition, state)(*a))(state, wanted.x, *arguments)


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_is_that_of_transformers(way, wanted):
    y = run(way, wanted)
    assert y.shape == wanted.x.shape and y.dtype == jnp.bfloat16
    assert difference(wanted.kept(y), wanted.y) < BOUND


@FEW
@pytest.mark.parametrize("way", ["plain", exhaustive("nnx"), exhaustive("equinox")])
def test_a_converted_layer_has_the_same_bits(way, wanted, tmp_path):
    folder = convert(wanted.folder, tmp_path / "packed")
    np.testing.assert_array_equal(run(way, wanted, folder), run("plain", wanted))


@FEW
@pytest.mark.parametrize("way", ["plain", "nnx", "equinox", exhaustive("nnx split"), exhaustive("equinox mapped")])
def test_a_layer_over_eight_devices(way, wanted):
    mesh = make_mesh({"expert": 8}, AxisType.Auto)
    wanted = wanted._replace(x=jax.device_put(jnp.tile(wanted.x, (8, 1)), NamedSharding(mesh, P("expert"))))
    if wanted.token_ids is not None:
        wanted = wanted._replace(token_ids=jnp.tile(wanted.token_ids, 8))
    y = run(way, wanted, mesh=mesh)
    assert y.sharding.is_equivalent_to(wanted.x.sharding, 2)
    assert difference(wanted.kept(y), np.tile(wanted.y, (8, 1))) < BOUND


def test_experts_over_other_axes(tmp_path):
    tiny.write("deepseek_v3", tmp_path / "checkpoint")
    mesh, axes = make_mesh({"data": 2, "tensor": 4}, AxisType.Auto), ("data", "tensor")
    options = {"expert_axis": axes, "token_axes": axes}
    arrays, found = whole_layer.read_layer(tmp_path / "checkpoint", 1, mesh, **options)
    assert arrays.experts.leaves.down.sharding.spec == P(axes) and arrays.shared is not None
    assert arrays.shared.leaves.down.sharding.is_fully_replicated and dict(found).items() >= options.items()
    x = jax.device_put(layers.tokens(), NamedSharding(mesh, P(axes)))
    y = jax.jit(lambda arrays, x: whole_layer.apply_layer(arrays, found, x))(arrays, x)
    assert difference(layers.kept(y), EXPECTED["deepseek_v3"]["y"]) < BOUND


@FEW
def test_each_part_of_a_layer_is_felt(wanted):
    """Or agreement would say nothing of it."""
    arrays, options = whole_layer.read_layer(wanted.folder, wanted.layer)
    router = arrays.router
    ungated = arrays._replace(router=dataclasses.replace(router, shared_gate=None))
    others = {"shared": ungated._replace(shared=None)} if arrays.shared is not None else {}
    if router.shared_gate is not None:
        others["gate"] = ungated
    if router.bias is not None:
        others["bias"] = arrays._replace(router=dataclasses.replace(router, bias=None))
    for name, other in others.items():
        y = whole_layer.apply_layer(other, options, wanted.x, wanted.token_ids)
        assert difference(wanted.kept(y), wanted.y) > 3 * BOUND, name


@FEW
def test_no_optimizer_takes_experts_for_parameters(wanted):
    nnx = pytest.importorskip("flax.nnx", reason="needs flax, which nothing else here does")
    layer = importlib.import_module("examples.flax_nnx_layer").ExpertLayer.from_checkpoint(wanted.folder, wanted.layer)
    router = mm.read_checkpoint(wanted.folder).router(wanted.layer)
    names = ("weight", "bias", "image_bias", "shared_gate", "logit_bias")
    shapes = [array.shape for name in names if (array := getattr(router, name)) is not None]
    assert sorted(leaf.shape for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param))) == sorted(shapes)


def test_other_types_and_leading_dimensions():
    arrays = whole_layer.random_layer(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 256), jnp.bfloat16)
    y = whole_layer.apply_layer(arrays, (), x)
    wide = whole_layer.apply_layer(arrays, (), x.astype(jnp.float32))
    assert wide.shape == x.shape and wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, y.astype(jnp.float32))
    np.testing.assert_array_equal(whole_layer.apply_layer(arrays, (), x.reshape(6, 256)).reshape(x.shape), y)


def test_what_is_no_hidden_state_is_refused():
    arrays = whole_layer.random_layer(jax.random.key(0))
    with pytest.raises(mm.errors.DTypeError, match="x has dtype int32"):
        whole_layer.apply_layer(arrays, (), jnp.ones((4, 256), jnp.int32))


def test_all_experts_become_the_format_that_is_wanted(tmp_path):
    """Those of DeepSeek-V4 are in two, which are two kernels."""
    stock = build(PLANS["deepseek-v4"])
    write(tmp_path, stock.config, stock.tensors, dtypes=stock.dtypes)
    arrays, options = whole_layer.read_layer(tmp_path, 1)
    assert arrays.shared is not None and (arrays.experts.format, arrays.shared.format) == ("mxfp4", "fp8_block")
    alike, _ = whole_layer.read_layer(tmp_path, 1, format="fp8_block")
    assert alike.shared is not None and alike.experts.format == alike.shared.format == "fp8_block"
    x = jax.random.normal(jax.random.key(0), (4, alike.router.weight.shape[1]), jnp.bfloat16)
    first, second = (whole_layer.apply_layer(each, options, x) for each in (arrays, alike))
    assert difference(first, second) < BOUND


def test_experts_that_are_narrower_than_the_model(tmp_path):
    stock = build(PLANS["kimi-k3"])
    folder = write(tmp_path, stock.config, stock.tensors)
    with pytest.raises(ValueError, match="has experts for 256 of the model's 512 columns, wanted all of them"):
        whole_layer.read_layer(folder, 1)


@pytest.mark.parametrize("module", ["flax_nnx_layer", "equinox_layer"])
def test_the_programs_of_modules_say_that_all_ways_are_the_same(module, capsys):
    pytest.importorskip("flax" if "flax" in module else "equinox", reason="needs the framework, as nothing else here")
    importlib.import_module(f"examples.{module}").main()
    assert "True" in capsys.readouterr().out


def test_two_kinds_of_layers_in_turns_are_one_scan():
    model = random_models.make("tiny-deepseek-v4", 5, ["moe"], jax.random.key(0))
    assert [(run.first, run.period, run.repeats) for run in model.config.runs] == [(0, 1, 1), (1, 2, 2)]
    parameters, experts = model.ways["moe"]
    # In FP32, in which a scan and a loop have the same sums; what is quantised stays so.
    dense = {name: value for name, value in parameters._asdict().items() if name != "shared"}
    parameters = parameters._replace(**jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dense))
    logits: list[list[jax.Array]] = []
    for is_unrolled in (False, True):
        config = dataclasses.replace(model.config, is_unrolled=is_unrolled)
        step = jax.jit(functools.partial(deepseek_v4.decode_step, config))
        cache = deepseek_v4.empty_cache(config, 3, 16, jnp.float32)
        logits.append([])
        for position in range(9):
            tokens = jnp.array([position, 7, 3], jnp.int32)
            positions = jnp.array([position, -1 if position < 4 else position - 4, position], jnp.int32)
            found, cache = step(parameters, experts, cache, tokens, positions)
            logits[-1].append(found)
    difference = np.stack(logits[0]) - np.stack(logits[1])
    assert np.sqrt(np.mean(difference**2)) < 1e-3


@pytest.mark.parametrize(
    "model, layers, ways",
    [
        ("tiny-qwen3", 1, ["moe", "ragged_dot"]),
        exhaustive("tiny-deepseek", 1, ["moe", "ragged_dot"]),
        exhaustive("tiny-deepseek-v4", 3, ["moe", "moe_fp8", "ragged_dot"]),
    ],
)
def test_the_benchmark_times_all_ways_in_one_run(model, layers, ways, tmp_path, capsys):
    output = tmp_path / "figures.json"
    arguments = f"--model {model} --layers {layers} --tokens 2 --length 8 --steps 2 --repeats 2 --output {output}"
    bench_decode.main(arguments.split())
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(ways)
    figures = json.loads(output.read_text())
    assert (figures["model"], figures["layers"]) == (model, layers)
    (row,) = figures["rows"]
    assert row["tokens"] == 2 and list(row) == ["tokens", *ways]
    for way in ways:
        times = row[way]
        assert times["step_us"] > 0 and times["tokens_per_second"] == pytest.approx(2e6 / times["step_us"])
        per_layer = times["experts_us_per_layer"] + times["rest_us_per_layer"]
        assert layers * per_layer == pytest.approx(times["step_us"])
        assert times["spread_us_per_layer"] > 0  # no two repeats take the same time


def test_the_benchmark_times_all_layers_and_the_ways_that_are_wanted(capsys):
    arguments = "--model tiny-qwen3 --layers all --ways ragged_dot --tokens 2 --length 8 --steps 2 --repeats 2"
    bench_decode.main(arguments.split())
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("tiny-qwen3, 4 layers") and [row.split()[1] for row in rows] == ["ragged_dot"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--model tiny-qwen3 --layers 5", "tiny-qwen3 has 4"),
        ("--model tiny-qwen3 --repeats 1", "wanted two or more"),
        ("--model tiny-qwen3 --layers 0", "tiny-qwen3 has 4"),
        ("--model tiny-qwen3 --layers some", "wanted a number, or all"),
        ("--model tiny-qwen3 --ways moe_fp8", "tiny-qwen3 has moe,ragged_dot"),
    ],
)
def test_the_benchmark_says_what_a_model_has(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_decode.main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in random_models.MODELS if not name.startswith("tiny")])
def test_decoders_take_random_models_of_real_sizes(name):
    ways = random_models.ways_of(name)

    def logits_of_step() -> list[jax.Array]:
        model = random_models.make(name, 2, ways, jax.random.key(0))
        cache = model.module.empty_cache(model.config, 4, 256, jnp.bfloat16)
        tokens = jnp.zeros(4, jnp.int32)
        return [model.module.decode_step(model.config, *model.ways[way], cache, tokens, tokens)[0] for way in ways]

    # Their shapes alone: the arrays are gigabytes.
    for logits in jax.eval_shape(logits_of_step):
        assert logits.shape == (4, random_models.MODELS[name]["vocab_size"])


def test_the_command_line_continues_prompts(tmp_path, monkeypatch, capsys):
    tiny.write("qwen3_moe", tmp_path / "checkpoint")
    arguments = "--prompt 5,99,3 --prompt 17 --new-tokens 3 --slots 2 --length 8 --dtype float32"
    monkeypatch.setattr(sys, "argv", ["qwen3_moe", str(tmp_path / "checkpoint"), *arguments.split()])
    qwen3_moe.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" -> ")[0] for line in lines[:2]] == ["5,99,3", "17"]
    assert all(len(line.split(" -> ")[1].split(",")) == 3 for line in lines[:2])
    assert lines[2].startswith("5 steps, 6 tokens")
