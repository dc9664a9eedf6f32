"""The layers of `examples` in the classes and by the names of frameworks, the benchmark and the command line."""

import dataclasses
import functools
import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from examples import bench_decode, deepseek_v4, qwen3_moe, random_models
from examples.expectations import tiny
from tests.support.cases import exhaustive

LAYER = 1  # has experts in both families


@pytest.fixture(scope="module", params=list(tiny.MODELS))
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    tiny.write(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def tokens():
    return jax.random.normal(jax.random.key(3), (3, 4, 256), jnp.bfloat16)


def by_hand(folder, x):
    checkpoint = mm.read_checkpoint(folder)
    router = checkpoint.router(LAYER)
    logits = jnp.matmul(x.astype(jnp.float32), router.weight.T, precision="highest")
    return mm.moe(x, checkpoint.experts(LAYER), *router.route(logits), **checkpoint.moe_options(LAYER))


def test_the_nnx_module_is_moe_also_after_split(folder, tokens):
    nnx = pytest.importorskip("flax.nnx", reason="needs flax, which nothing else here does")
    layer = importlib.import_module("examples.flax_nnx_layer").ExpertLayer.from_checkpoint(folder, LAYER)
    wanted = by_hand(folder, tokens)
    np.testing.assert_array_equal(nnx.jit(lambda layer, x: layer(x))(layer, tokens), wanted)
    definition, state = nnx.split(layer)
    merged = jax.jit(lambda state, x: nnx.merge(definition, state)(x))
    np.testing.assert_array_equal(merged(state, tokens), wanted)
    has_bias = mm.read_checkpoint(folder).router(LAYER).bias is not None
    assert set(nnx.state(layer, nnx.Param)) == ({"router", "bias"} if has_bias else {"router"})


def test_the_equinox_module_is_moe_also_mapped(folder, tokens):
    equinox = pytest.importorskip("equinox", reason="needs equinox, which nothing else here does")
    layer = importlib.import_module("examples.equinox_layer").ExpertLayer.from_checkpoint(folder, LAYER)
    wanted = by_hand(folder, tokens)
    np.testing.assert_array_equal(equinox.filter_jit(layer)(tokens), wanted)
    mapped = equinox.filter_jit(lambda layer, x: jax.vmap(layer)(x))
    np.testing.assert_array_equal(mapped(layer, tokens), wanted)


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
