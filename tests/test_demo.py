"""The demo: its command line end to end at tiny sizes, and the parts whose errors a plausible text would hide."""

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_megamoe.demo import __main__ as command_line
from jax_megamoe.demo import checkpoint, decode, model, text, train
from jax_megamoe.demo import mesh as demo_mesh
from jax_megamoe.errors import ShardingError
from jax_megamoe.weight_layout import Format
from tests.support.cases import exhaustive
from tests.support.cuda_lowering import cuda_text
from tests.support.demo import TINY, WIDE, assert_mesh_decodes_as_one_device, loop_arguments, make_parameters
from tests.support.skips import unless, why_no_host_devices
from tests.support.terminal import Terminal

needs_devices = unless(why_no_host_devices())


@pytest.fixture
def parameters() -> model.Parameters:
    return make_parameters(TINY)


@pytest.fixture
def short_corpus(monkeypatch: pytest.MonkeyPatch) -> text.Corpus:
    whole = text.load_corpus()
    corpus = text.Corpus(train=whole.train[:20_000], held_out=whole.held_out[:1_000])
    monkeypatch.setattr(text, "load_corpus", lambda: corpus)
    return corpus


def run(path: Path, *arguments: str, config: model.ModelConfig = TINY) -> int:
    return command_line.main(["--checkpoint", str(path), "--tokens", "12", *arguments], config)


@pytest.mark.usefixtures("short_corpus")
def test_command_line_trains_measures_decodes_and_reuses_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache" / "demo.npz"
    assert run(path, "--steps", "60", "--prompt", "The ", "--prompt", "A class", "--batch", "3") == 0
    first = capsys.readouterr()
    assert "trained now" in first.out
    assert "training 100%, step 60, " in first.err

    (float_bits,) = map(float, re.findall(r"(\S+) bits/char with float", first.out))
    assert float_bits < math.log2(len(text.VOCABULARY)) - 0.5
    measured = re.findall(r"(\S+) bits/char with moe \((\w+)\), difference (\S+)", first.out)
    assert [format for _, format, _ in measured] == ["fp8_block", "mxfp4"]
    # E2M1 has two bits of mantissa less than E4M3, and so is four times as coarse.
    for (bits, _, difference), tolerance in zip(measured, (0.02, 0.08), strict=True):
        assert float(difference) == pytest.approx(float(bits) - float_bits, abs=2e-4)
        assert abs(float(difference)) < tolerance
    assert re.search(
        r"decoding +\d+\.\d tokens/s, \d+\.\d{3} ms per step \(3 sequences x 18 steps in \S+ s, fp8_block\)", first.out
    )
    continued = first.out.split("\n--- continuing ")[1:]
    for section, prompt in zip(continued, ["The ", "A class", "The "], strict=True):
        heading, generated = section.split("\n", 1)
        assert heading == repr(prompt)
        assert generated.startswith(prompt)
        assert len(generated.removesuffix("\n")) >= len(prompt) + 11

    monkeypatch.setattr(command_line, "train", lambda *_: pytest.fail("The second run trains."))
    decoded: list[model.Experts] = []

    def generate(
        config: model.ModelConfig, parameters: model.Parameters, experts: model.Experts, *rest: Any, **options: Any
    ) -> Any:
        decoded.append(experts)
        return decode.generate(config, parameters, experts, *rest, **options)

    monkeypatch.setattr(command_line, "generate", generate)
    assert run(path, "--prompt", "The ", "--temperature", "0", "--format", "fp8_channel") == 0
    second = capsys.readouterr()
    assert f"60 training steps, loaded from {path}" in second.out
    again = re.findall(r"(\S+) bits/char with moe \((\w+)\), difference (\S+)", second.out)
    assert again[:2] == measured and [format for _, format, _ in again[2:]] == ["fp8_channel"]
    assert abs(float(again[2][2])) < 0.02
    assert [getattr(experts, "format", None) for experts in decoded] == ["fp8_channel"]


def test_unknown_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "demo.npz", "--format", "fp4")
    assert "--format: invalid choice: 'fp4'" in capsys.readouterr().err


@pytest.mark.usefixtures("short_corpus")
def test_unusable_checkpoint_is_refused_where_named_and_replaced_in_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = checkpoint.default_path()
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 but no archive")

    assert run(path) == 2
    error = capsys.readouterr().err
    assert "is not a checkpoint of this demo or is damaged" in error
    assert "--retrain" in error
    assert path.read_bytes() == b"PK\x03\x04 but no archive"

    assert command_line.main(["--steps", "1", "--tokens", "1"], TINY) == 0
    captured = capsys.readouterr()
    assert "Training again" in captured.err
    assert "1 training steps, trained now" in captured.out

    assert run(path, config=dataclasses.replace(TINY, top_k=1)) == 2
    assert "has another model" in capsys.readouterr().err


def test_checkpoint_round_trip_and_damage(
    tmp_path: Path, parameters: model.Parameters, short_corpus: text.Corpus
) -> None:
    path = tmp_path / "demo.npz"
    with pytest.raises(FileNotFoundError):
        checkpoint.load(path, TINY, short_corpus)
    checkpoint.save(path, checkpoint.Checkpoint(parameters, 7), TINY, short_corpus)
    assert [file.name for file in tmp_path.iterdir()] == ["demo.npz"]
    loaded = checkpoint.load(path, TINY, short_corpus)
    assert loaded.steps == 7
    jax.tree.map(np.testing.assert_array_equal, loaded.parameters, parameters)

    other_text = text.Corpus(train=short_corpus.train[1:], held_out=short_corpus.held_out)
    with pytest.raises(checkpoint.CheckpointError, match="another train_sha256"):
        checkpoint.load(path, TINY, other_text)

    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load(path, TINY, short_corpus)

    np.save(path.with_suffix(".npy"), np.zeros(3))
    np.savez(path.with_suffix(".other.npz"), description=np.array(json.dumps([1])))
    for name in (path.with_suffix(".npy"), path.with_suffix(".other.npz")):
        with pytest.raises(checkpoint.CheckpointError, match="not a checkpoint"):
            checkpoint.load(name, TINY, short_corpus)


@pytest.mark.usefixtures("short_corpus")
def test_unknown_symbol_in_the_prompt_fails_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "train", lambda *_: pytest.fail("A bad prompt trains."))
    assert run(tmp_path / "demo.npz", "--prompt", "naïve") == 2
    assert "'ï' at position 2" in capsys.readouterr().err


def test_corpus_is_held_out_and_round_trips() -> None:
    corpus = text.load_corpus()
    train_text, held_out = text.decode(corpus.train), text.decode(corpus.held_out)
    assert len(held_out) > 20_000
    np.testing.assert_array_equal(text.encode(held_out), corpus.held_out)
    seen = {" ".join(paragraph.split()) for paragraph in train_text.split("\n\n")}
    # The first paragraph may be the rest of one that the split cut.
    assert not [paragraph for paragraph in held_out.split("\n\n")[1:] if " ".join(paragraph.split()) in seen]


@pytest.mark.parametrize("kind", ["float", "fp8_block", "mxfp4"])
def test_decoding_with_the_cache_equals_the_full_forward(parameters: model.Parameters, kind: str) -> None:
    experts = parameters.experts if kind == "float" else model.quantize(parameters.experts, cast(Format, kind))
    tokens = jax.random.randint(jax.random.key(2), (3, TINY.context), 0, TINY.vocabulary_size)
    expected, _ = jax.jit(model.forward, static_argnums=0)(TINY, parameters, experts, tokens)

    step = jax.jit(model.decode_step, static_argnums=0)
    cache = model.empty_cache(TINY, 3)
    for position in range(TINY.context):
        logits, cache = step(TINY, parameters, experts, tokens[:, position], jnp.int32(position), cache)
        # A last-bit difference before an FP8 cast may move a value to its neighbour: one part in 16.
        tolerance = 1e-4 if kind == "float" else 0.05
        np.testing.assert_allclose(logits, expected[:, position], rtol=0, atol=tolerance)


def test_past_the_context_the_cache_holds_the_last_symbols(parameters: model.Parameters) -> None:
    # With one layer keys and values depend on their own symbol only, so a window started afresh has the same answer.
    config = dataclasses.replace(TINY, num_layers=1)
    blocks, experts = jax.tree.map(lambda leaf: leaf[:1], (parameters.blocks, parameters.experts))
    parameters = parameters._replace(blocks=blocks, experts=experts)
    length = 2 * TINY.context + 5
    tokens = jax.random.randint(jax.random.key(3), (2, length), 0, TINY.vocabulary_size)
    step = jax.jit(model.decode_step, static_argnums=0)
    cache = model.empty_cache(config, 2)
    for position in range(length):
        logits, cache = step(config, parameters, experts, tokens[:, position], jnp.int32(position), cache)
    expected, _ = model.forward(config, parameters, experts, tokens[:, -TINY.context :])
    np.testing.assert_allclose(logits, expected[:, -1], rtol=0, atol=1e-4)


def test_greedy_generation_is_what_the_full_forward_would_pick(parameters: model.Parameters) -> None:
    prompts = ["of a", "the st"]
    generation = decode.generate(TINY, parameters, parameters.experts, prompts, 6, temperature=0.0)
    assert generation.num_steps == 11
    forward = jax.jit(model.forward, static_argnums=0)
    for prompt, generated in zip(prompts, generation.texts, strict=True):
        # One shape, one compilation: what stands after the symbols so far is not seen by them.
        expected = np.zeros(len(prompt) + 6, np.int32)
        expected[: len(prompt)] = text.encode(prompt)
        for position in range(len(prompt), len(expected)):
            logits, _ = forward(TINY, parameters, parameters.experts, jnp.asarray(expected)[None])
            expected[position] = jnp.argmax(logits[0, position - 1])
        assert generated == text.decode(expected)


def test_empty_prompt_is_an_error(parameters: model.Parameters) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        decode.generate(TINY, parameters, parameters.experts, [""], 3)


def test_float_experts_match_a_dense_sum_and_drop_past_capacity() -> None:
    keys = jax.random.split(jax.random.key(4), 4)
    experts = model.FloatExperts(
        *(jax.random.normal(key, (4, 128, 128)) / 12 for key in keys[:3]),
    )
    x = jax.random.normal(keys[3], (1, 6, 128))
    ids = jnp.array([[[0, 1], [0, 2], [0, 3], [0, 1], [3, 0], [2, 1]]], jnp.int32)
    topk_weights = jnp.full(ids.shape, 0.5)

    def dense(keep: np.ndarray) -> np.ndarray:
        result = np.zeros((6, 128), np.float32)
        for token, slot in np.argwhere(keep):
            row, expert = np.asarray(x[0, token]), int(ids[0, token, slot])
            gate, up, down = (np.asarray(leaf[expert]) for leaf in experts)
            gated = gate @ row
            result[token] += 0.5 * down @ (gated / (1 + np.exp(-gated)) * (up @ row))
        return result

    everything = np.ones((6, 2), bool)
    np.testing.assert_allclose(model.float_moe(x, experts, ids, topk_weights, 6)[0], dense(everything), atol=1e-4)
    first_two = everything.copy()
    first_two[[2, 3, 4, 5], [0, 0, 1, 1]] = False  # expert 0 is full after two tokens, expert 1 too
    np.testing.assert_allclose(model.float_moe(x, experts, ids, topk_weights, 2)[0], dense(first_two), atol=1e-4)


def test_every_parameter_is_trained(parameters: model.Parameters) -> None:
    recipe = train.TrainConfig(seconds=None, steps=1)
    tokens = jax.random.randint(jax.random.key(5), (4, TINY.context + 1), 0, TINY.vocabulary_size)
    before = jax.tree.map(np.array, parameters)
    state = train.adam_init(parameters)
    after, state, surprise = train.train_step(TINY, recipe, parameters, state, tokens, jnp.float32(1e-3))
    assert math.isfinite(surprise)
    assert int(state.step) == 1
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert np.isfinite(new).all(), path
        # Adam's first step has the size of the learning rate wherever there is a gradient, and clipping leaves that.
        assert np.max(np.abs(new - old)) == pytest.approx(1e-3, rel=0.05), path


def test_balance_loss_is_one_when_even_and_more_when_not() -> None:
    even = model.Routing(jnp.full((1, 1, 4, 4), 0.25), jnp.array([[[[0, 1], [2, 3], [1, 0], [3, 2]]]]))
    assert float(train.balance_loss(even)) == pytest.approx(1.0)
    uneven = model.Routing(jnp.tile(jnp.array([0.7, 0.1, 0.1, 0.1]), (1, 1, 4, 1)), jnp.zeros((1, 1, 4, 1), jnp.int32))
    assert float(train.balance_loss(uneven)) == pytest.approx(2.8)


# On a mesh.


@needs_devices
@pytest.mark.parametrize(
    ("num_devices", "num_prompts"),
    [*(exhaustive(*each) for each in ((8, 3), (2, 1))), (8, 16)],
)
def test_text_on_a_mesh_is_that_of_one_device(num_devices: int, num_prompts: int) -> None:
    compiled = assert_mesh_decodes_as_one_device(num_devices, num_prompts, jax.devices("cpu"))
    # Each device's part of the cache, with its heads of every sequence.
    part = (WIDE.num_layers, num_prompts, WIDE.context, WIDE.num_heads // num_devices, WIDE.head_size)
    assert f"f32[{','.join(map(str, part))}]" in compiled
    # Of the residual stream: one sum after attention, one collection of what `moe` gives.
    opcodes = re.findall(r"= [^ ]+ (all-[a-z]+|collective-permute|reduce-scatter)\(", compiled)
    assert opcodes.count("all-reduce") <= 2 and "collective-permute" not in opcodes


@needs_devices
@pytest.mark.usefixtures("built")
def test_loop_on_gpus_has_one_fused_call() -> None:
    mesh = demo_mesh.make_mesh(WIDE, 8, jax.devices("cpu"))
    arguments = loop_arguments(WIDE, mesh, 3)
    with jax.set_mesh(mesh):
        text = cuda_text(lambda *a: decode.decode_loop(WIDE, *a, 0.0, None), *arguments)
    assert re.findall(r"custom_call @(jax_megamoe[\w.]+)", text) == ["jax_megamoe.moe_peers.v3"]
    assert text.count("stablehlo.while") == 2  # positions, layers
    assert not re.search(r"all_gather|all_to_all|reduce_scatter", text)


def test_progress_of_the_training() -> None:
    lines, terminal = io.StringIO(), Terminal()
    for stream in (lines, terminal):
        progress = train.Progress(stream)
        for step in range(1, 41):
            progress.show(step / 39, step, 6.5 - 0.1 * step)
        progress.close()
    printed = lines.getvalue().splitlines()
    assert len(printed) == 10 and printed[-1] == "training 100%, step 39, 2.600 bits/char"
    assert "\n" not in terminal.getvalue()[:-1] and terminal.getvalue().endswith("\n")
    assert terminal.last_drawn().startswith("training 100%|") and "step 40, 2.500 bits/char" in terminal.last_drawn()


@needs_devices
def test_meshes_that_the_model_does_not_fit_are_refused() -> None:
    devices = jax.devices("cpu")[:8]
    with pytest.raises(ShardingError, match="9 devices were asked for and 1 processes have 8"):
        demo_mesh.make_mesh(WIDE, 9, devices)
    with pytest.raises(ShardingError, match="8 heads and 8 experts, wanted multiples of the 3 devices"):
        demo_mesh.make_mesh(WIDE, 3, devices)
    with pytest.raises(ShardingError, match="2 heads"):
        demo_mesh.make_mesh(TINY, 4, devices)


@needs_devices
@pytest.mark.exhaustive
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="tests/gpu/test_demo.py has the same for GPUs")
def test_command_line_on_eight_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], short_corpus: text.Corpus
) -> None:
    path = tmp_path / "demo.npz"
    checkpoint.save(path, checkpoint.Checkpoint(make_parameters(WIDE), 7), WIDE, short_corpus)
    outputs = []
    for devices in ("1", "8"):
        assert run(path, "--devices", devices, "--temperature", "0", "--batch", "3", config=WIDE) == 0
        outputs.append(capsys.readouterr().out)
        assert f"device      {devices} x " in outputs[-1]
        assert re.search(r"tokens/s, \d+\.\d{3} ms per step", outputs[-1])
    alone, together = (output.split("--- continuing", 1)[1] for output in outputs)
    assert alone == together

    assert run(path, "--devices", "3", config=WIDE) == 2
    assert "wanted multiples of the 3 devices" in capsys.readouterr().err
