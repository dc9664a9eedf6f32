"""The command line of the decoders in `examples`: what cannot be is said in a sentence, not in a traceback."""

import dataclasses
import types

import numpy as np
import pytest

import jax_megamoe as mm
from examples import command
from examples.dense import open_checkpoint
from tests.support.checkpoints import build, write
from tests.support.families import PLANS


@dataclasses.dataclass
class Config:
    is_unrolled: bool = False


def load(folder, **options):
    if folder == "none":
        raise ValueError("none holds glm5, wanted qwen3_moe: use the example of its family.")
    return Config(), types.SimpleNamespace(embedding=np.zeros((128, 4))), None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--prompt", "1"], "error: none holds glm5, wanted qwen3_moe"),
        (["model", "--prompt", "1", "--mesh", "3x999"], "the mesh is 3 x 999, wanted one of at most"),
        (["model", "--prompt", "1", "--mesh", "8"], "'8', wanted data x tensor, as 2x4"),
        (["model", "--prompt", "1", "--mesh=-1x-2"], "'-1x-2', wanted positive numbers, as 2x4"),
        (["model", "--prompt", "1", "--mesh", "3x1"], "--slots is 8, wanted a multiple of 3, the mesh's data"),
        (["model", "--prompt", "1", "--slots", "0"], "--slots is 0, wanted 1 or more"),
        (["model", "--prompt", "1", "--new-tokens", "-3"], "--new-tokens is -3, wanted 1 or more"),
        (["model", "--prompt", "hello"], "'hello', wanted token ids, as 1,2,3: use the model's tokenizer"),
        (["model", "--prompt", "1,2", "--prompt", "9707"], "has ids [9707], wanted ids of the vocabulary, 0 to 127"),
        (["model", "--prompt", "1,2,3", "--length", "2"], "has 3 ids, wanted at most --length 2: pass a larger one"),
    ],
)
def test_what_cannot_be(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["example", *arguments])
    with pytest.raises(SystemExit) as caught:
        command.main("An example.", load, lambda *sizes: None, lambda *step: pytest.fail("a step"))
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_experts_of_another_model_are_refused(tmp_path):
    stock = build(PLANS["qwen3-bf16"])
    model = write(tmp_path / "model", stock.config, stock.tensors)
    converted = tmp_path / "converted"
    mm.checkpoints.convert(model, converted)
    experts = open_checkpoint(model, converted, "qwen3_moe")
    assert experts.moe_layers == open_checkpoint(model, None, "qwen3_moe").moe_layers
    other = write(tmp_path / "other", stock.config | {"rope_theta": 7}, stock.tensors)
    with pytest.raises(ValueError, match="converted has experts of another config.json than that of .*other, wanted"):
        open_checkpoint(other, converted, "qwen3_moe")


def test_a_model_of_another_family_is_refused(tmp_path):
    stock = build(PLANS["qwen3-bf16"])
    model = write(tmp_path / "model", stock.config, stock.tensors)
    message = "model holds qwen3_moe, wanted deepseek_v3: use the example of its family"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(model, None, "deepseek_v3", "kimi_k2")
