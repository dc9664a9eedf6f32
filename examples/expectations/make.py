"""Makes the JSON files beside this one: what `transformers` computes of the tiny checkpoints.

    pip install torch transformers
    python -m examples.expectations.make

Needs neither a GPU nor this package's kernel. CI does not run it: it compares with the files.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

from examples.expectations import gpt_oss_layer, layers, qwen3_5_layer, tiny

# Prompts of unequal lengths, more of them than a test has slots; and how many tokens follow each.
PROMPTS = [[17], [5, 99, 3], [64, 2, 77, 31, 8, 120], [1, 2], [90] * 5, [33, 101, 54, 12, 7, 70, 19, 88, 41, 26]]
PROMPTS += [[50, 49], [127], [21, 22, 23], [9, 115, 60, 4]]
NUM_WITH_LOGITS = 6  # of the prompts, to keep the files small
NEW_TOKENS = [20, 6, 12, 14, 3, 8, 10, 4, 13, 9]


def continue_greedily(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """The likeliest tokens after a prompt, one after the other, and the logits f32[num_tokens, V] they come from."""
    tokens, logits, cache = torch.tensor([prompt]), [], None
    generated: list[int] = []
    for _ in range(num_tokens):
        result = model(tokens, cache=cache, use_cache=True)
        cache = result.cache
        logits.append(result.logits[0, -1].float())
        generated.append(int(logits[-1].argmax()))
        tokens = torch.tensor([generated[-1:]])
    return generated, torch.stack(logits)


@torch.no_grad()
def expect(family: str) -> dict[str, Any]:
    """Tokens of all prompts, by how much their logits won; for some prompts all logits of the first and last one."""
    with tempfile.TemporaryDirectory() as folder:
        digest = tiny.write(family, Path(folder) / "quantized")
    model = load(family)
    cases: list[dict[str, Any]] = []
    for prompt, num_tokens in zip(PROMPTS, NEW_TOKENS, strict=True):
        tokens, logits = continue_greedily(model, prompt, num_tokens)
        best = logits.topk(2, dim=-1).values
        case: dict[str, Any] = {"prompt": prompt, "tokens": tokens}
        case["margins"] = [round(float(margin), 4) for margin in best[:, 0] - best[:, 1]]
        if len(cases) < NUM_WITH_LOGITS:
            case["first_logits"] = [round(float(logit), 4) for logit in logits[0]]
            case["last_logits"] = [round(float(logit), 4) for logit in logits[-1]]
        cases.append(case)
    return {"made_with": versions(), "checkpoint_sha256": digest, "cases": cases}


def load(family: str) -> Any:
    """The model of a tiny checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tiny.write(family, Path(folder) / "float", is_float=True)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "float", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    wrong = {what: names for what, names in loading.items() if names}
    assert not wrong, f"transformers did not find all of the checkpoint: {wrong}"
    return model


def qwen3_5() -> Any:
    """The layer of Qwen3.5's tiny checkpoint."""
    config = transformers.Qwen3_5MoeTextConfig(**qwen3_5_layer.CONFIG, experts_implementation="eager")
    layer, stem = Qwen3_5MoeSparseMoeBlock(config), f"{qwen3_5_layer.STEM}."
    held = qwen3_5_layer.tensors(is_float=True)
    layer.load_state_dict({name.removeprefix(stem): torch.from_numpy(array) for name, array in held.items()})
    return layer


@torch.no_grad()
def expect_layers() -> dict[str, Any]:
    """Of the layers in `layers.py`: the digest of the checkpoint, and of each token the columns that are kept."""
    found: dict[str, Any] = {"made_with": versions()}
    x = torch.from_numpy(layers.tokens().astype("float32"))[None]
    for name, (write, number) in layers.LAYERS.items():
        with tempfile.TemporaryDirectory() as folder:
            digest = write(Path(folder) / "quantized")
        family = name.removesuffix("_hash")
        layer = qwen3_5() if family == "qwen3_5_moe" else load(family).model.layers[number].mlp
        y = layer(x, input_ids=torch.tensor([layers.TOKEN_IDS])) if family == "deepseek_v4" else layer(x)
        y = layers.kept(y[0].numpy())
        rows = [[round(float(value), 5) for value in row] for row in y]
        found[name] = {"checkpoint_sha256": digest, "y": rows}
    return found


@torch.no_grad()
def expect_gpt_oss() -> dict[str, Any]:
    """Of gpt-oss' layer: the experts of each token, their weights, and the results."""
    with tempfile.TemporaryDirectory() as folder:
        digest = gpt_oss_layer.write(Path(folder) / "quantized")
    layer = GptOssMLP(transformers.GptOssConfig(**gpt_oss_layer.CONFIG, experts_implementation="eager"))
    stem = f"{gpt_oss_layer.STEM}."
    held = gpt_oss_layer.tensors(is_float=True)
    layer.load_state_dict({name.removeprefix(stem): torch.from_numpy(array) for name, array in held.items()})
    x = torch.from_numpy(gpt_oss_layer.tokens().astype("float32"))
    _, weights, ids = layer.router(x)
    y, _ = layer(x[None])

    def rounded(values: torch.Tensor) -> list[list[float]]:
        return [[round(float(value), 5) for value in row] for row in values]

    return {
        "made_with": versions(),
        "checkpoint_sha256": digest,
        "ids": ids.tolist(),
        "weights": rounded(weights),
        "y": rounded(y[0]),
    }


def versions() -> dict[str, str]:
    """Of what computes the expectations."""
    return {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}


def main() -> None:
    """Writes a file for each family."""
    torch.set_num_threads(1)  # The order of sums, and so the last digits, would depend on the machine.
    for family in tiny.MODELS:
        expected = expect(family)
        lowest = min(min(case["margins"]) for case in expected["cases"])
        cases = ",\n".join(json.dumps(case, separators=(",", ":")) for case in expected.pop("cases"))
        text = json.dumps(expected)[:-1] + f', "cases": [\n{cases}\n]}}\n'
        (Path(__file__).parent / f"{family}.json").write_text(text)
        print(f"{family}: the smallest margin is {lowest}, {len(text)} bytes")
    for name, expected in (("gpt_oss_layer", expect_gpt_oss()), ("layers", expect_layers())):
        text = json.dumps(expected, separators=(",", ":")).replace("],[", "],\n[") + "\n"
        (Path(__file__).parent / f"{name}.json").write_text(text)
        print(f"{name}: {len(text)} bytes")


if __name__ == "__main__":
    main()
