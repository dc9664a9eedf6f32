"""A tiny expert layer of gpt-oss, the same bytes wherever it is made: NumPy alone, no torch.

No whole model: the examples have no decoder of this family. Names and types are those of the published checkpoints,
MXFP4 with rows of gate and up in turn; `write(..., is_float=True)` writes the same values in FP32, transposed, by the
names that `transformers` has for them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from examples.expectations import tiny
from examples.expectations.tiny import Array

# Neither size is a multiple of 128, as 2880 is none.
CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "hidden_act": "silu",
}
STEM = "model.layers.0.mlp"
NUM_TOKENS = 5
_SEED = 1


def tensors(*, is_float: bool) -> dict[str, Array]:
    """The layer's tensors by name."""
    h, i, e = (CONFIG[key] for key in ("hidden_size", "intermediate_size", "num_local_experts"))
    made = tiny.Tensors(_SEED, is_float=is_float, scale="scale")
    made.add_matrix(f"{STEM}.router", e, h, is_fp8=False)
    made.add(f"{STEM}.router.bias", made.uniform(e))
    # Gains with which the bounds of the activation are reached now and then.
    for name, rows, columns, gain in (("gate_up_proj", 2 * i, h, 4.0), ("down_proj", h, i, 0.5)):
        stem = f"{STEM}.experts.{name}"
        for expert in range(e):
            made.add_mxfp4(f"{stem}.{expert}", rows, columns, gain)
        weight, *scales = (
            np.stack([made.tensors.pop(f"{stem}.{expert}.{part}") for expert in range(e)])
            for part in (("weight",) if is_float else ("weight", "scale"))
        )
        if is_float:
            made.tensors[stem] = np.ascontiguousarray(weight.swapaxes(1, 2))
        else:
            made.tensors[f"{stem}_blocks"] = weight.view(np.uint8).reshape(e, rows, columns // 32, 16)
            made.tensors[f"{stem}_scales"] = scales[0].view(np.uint8)
        made.add(f"{stem}_bias", made.uniform(e, rows))
    return made.tensors


def tokens() -> Array:
    """What the layer is applied to, bf16[T, H]."""
    shape = NUM_TOKENS, CONFIG["hidden_size"]
    return tiny.Tensors(_SEED + 1, is_float=False).uniform(*shape).astype(ml_dtypes.bfloat16)


def write(folder: Path, *, is_float: bool = False) -> str:
    """Writes the checkpoint to a folder, which is made; returns the SHA-256 of the file of its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    content = tiny.safetensors_bytes(tensors(is_float=is_float))
    (folder / "model.safetensors").write_bytes(content)
    return hashlib.sha256(content).hexdigest()
