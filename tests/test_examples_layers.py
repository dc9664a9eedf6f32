"""The layers of `examples` in the classes and by the names of frameworks, the benchmark and the command line."""

import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from examples import bench_decode, maxtext_layer, qwen3_moe, random_models
from examples.expectations import tiny

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


def maxtext_result(config, inputs, gate, bias, wi_0, wi_1, wo):
    """In float64, by MaxText's definitions: of one token after the other."""
    result = np.zeros(inputs.shape)
    for place in np.ndindex(inputs.shape[:2]):
        x = inputs[place]
        scores = x @ gate
        if config.routed_score_func == "sigmoid":
            scores = 1 / (1 + np.exp(-scores))
        biased = scores if bias is None else scores + bias
        if config.n_routing_groups > 0:
            groups = biased.reshape(config.n_routing_groups, -1)
            best = np.argsort(-np.sort(groups)[:, -2:].sum(axis=1))[: config.topk_routing_group]
            is_open = np.isin(np.arange(len(groups)), best).repeat(groups.shape[1])
            biased = np.where(is_open, biased, -np.inf)
        chosen = np.argsort(-biased)[: config.num_experts_per_tok]
        weights = scores[chosen]
        weights = weights if config.routed_score_func else np.exp(weights - weights.max())
        weights = weights / weights.sum() * config.routed_scaling_factor
        for expert, weight in zip(chosen, weights, strict=True):
            gate_values, up = x @ wi_0[expert], x @ wi_1[expert]
            limit = config.mlp_activations_limit
            if limit > 0:
                gate_values, up = np.minimum(gate_values, limit), np.clip(up, -limit, limit)
            result[place] += weight * (gate_values / (1 + np.exp(-gate_values)) * up @ wo[expert])
    return result


@pytest.mark.parametrize(
    "config, has_bias, is_sharded",
    [
        (maxtext_layer.Config(num_experts_per_tok=4), False, False),
        (maxtext_layer.Config(4, "sigmoid", 2.5, 4, 2), True, True),
        (maxtext_layer.Config(2, "sigmoid", mlp_activations_limit=0.5), True, False),
    ],
    ids=["softmax", "groups, sharded", "limit"],
)
def test_maxtext_names_mean_what_they_mean_there(config, has_bias, is_sharded):
    rng = np.random.default_rng(0)
    wi_0, wi_1, wo = (rng.standard_normal(s) / s[1] ** 0.5 for s in ((16, 256, 128), (16, 256, 128), (16, 128, 256)))
    gate, bias = rng.standard_normal((256, 16)) / 8, rng.standard_normal(16) / 10 if has_bias else None
    inputs = np.asarray(jnp.asarray(rng.standard_normal((8, 2, 256)), jnp.bfloat16))
    mesh = None
    if is_sharded:
        axes = ("data", "fsdp", "tensor", "expert")
        mesh = jax.make_mesh((2, 2, 1, 2), axes, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:8])
    wide = [jnp.asarray(each, jnp.float32) for each in (wi_0, wi_1, wo)]
    weights = maxtext_layer.pack(wide[0], wide[1], wide[2], mesh)
    x = jax.device_put(inputs, None if mesh is None else NamedSharding(mesh, P(maxtext_layer.BATCH_AXES)))
    arrays = (jnp.asarray(gate, jnp.float32), None if bias is None else jnp.asarray(bias, jnp.float32))
    y = jax.jit(lambda x, weights: maxtext_layer.routed_moe(config, mesh, x, *arrays, weights))(x, weights)
    wanted = maxtext_result(config, inputs.astype(np.float64), gate, bias, wi_0, wi_1, wo)
    # Weights, tokens and activations are rounded to FP8, each by 0.03 (root of the mean square) of its values; 0.06 was
    # measured, and 0.08 with the limit.
    error = np.linalg.norm(np.asarray(y, np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < 0.1


@pytest.mark.parametrize(
    "model, layers, ways",
    [
        ("tiny-qwen3", 1, ["moe", "ragged_dot"]),
        pytest.param("tiny-deepseek", 1, ["moe", "ragged_dot"], marks=pytest.mark.exhaustive),
        pytest.param("tiny-deepseek-v4", 3, ["moe", "moe_fp8", "ragged_dot"], marks=pytest.mark.exhaustive),
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
    arguments = "--model tiny-qwen3 --layers all --ways ragged_dot --tokens 2 --length 8 --steps 2 --repeats 1"
    bench_decode.main(arguments.split())
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("tiny-qwen3, 4 layers") and [row.split()[1] for row in rows] == ["ragged_dot"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--model tiny-qwen3 --layers 5", "tiny-qwen3 has 4"),
        ("--model tiny-qwen3 --layers 0", "tiny-qwen3 has 4"),
        ("--model tiny-qwen3 --layers some", "wanted a number, or all"),
        ("--model tiny-qwen3 --ways moe_fp8", "tiny-qwen3 has moe,ragged_dot"),
        ("--model tiny-deepseek-v4 --scan", "always unrolled"),
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
