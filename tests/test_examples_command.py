"""The command line of the decoders in `examples`: what cannot be is said in a sentence, not in a traceback."""

import dataclasses
import types

import numpy as np
import pytest

from examples import command


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
