"""A tiny expert layer of Qwen3.5-MoE, the same bytes wherever it is made: NumPy alone, no torch.

No whole model: the examples have no decoder of this family. Its shared expert is twice as wide as a routed one, and a
gate weighs it for each token. Names and types are those of the published FP8 checkpoints.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from examples.expectations import tiny
from examples.expectations.tiny import Array

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
}
STEM = "model.language_model.layers.0.mlp"
_SEED = 7


def tensors(*, is_float: bool) -> dict[str, Array]:
    """The layer's tensors by name; in FP32 those of all experts are in two, as `transformers` has them."""
    h, i, e = (CONFIG[key] for key in ("hidden_size", "moe_intermediate_size", "num_experts"))
    made = tiny.Tensors(_SEED, is_float=is_float)
    made.add_matrix(f"{STEM}.gate", e, h, is_fp8=False, gain=tiny.SOFTMAX_GAIN)
    for expert in range(e):
        made.add_mlp(f"{STEM}.experts.{expert}", h, i)
    made.add_mlp(f"{STEM}.shared_expert", h, CONFIG["shared_expert_intermediate_size"])
    made.add_matrix(f"{STEM}.shared_expert_gate", 1, h, is_fp8=False, gain=tiny.SIGMOID_GAIN)
    if is_float:
        gate, up, down = (
            np.stack([made.tensors.pop(f"{STEM}.experts.{expert}.{name}_proj.weight") for expert in range(e)])
            for name in ("gate", "up", "down")
        )
        made.tensors[f"{STEM}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        made.tensors[f"{STEM}.experts.down_proj"] = down
    return made.tensors


def write(folder: Path) -> str:
    """Writes the checkpoint to a folder, which is made; returns the SHA-256 of the file of its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe", "text_config": CONFIG}))
    content = tiny.safetensors_bytes(tensors(is_float=False))
    (folder / "model.safetensors").write_bytes(content)
    return hashlib.sha256(content).hexdigest()
