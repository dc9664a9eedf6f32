"""Tiny random checkpoints of the families, the same bytes wherever they are made: NumPy alone, no torch.

Names and types of tensors are those of published checkpoints: experts, and with DeepSeek-V3 all big matrices, FP8 with
a scale per 128x128 block, the rest BF16. `write(..., is_float=True)` writes the same values in FP32 instead, for
implementations that do not read FP8.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

# Routers are decisive, so that few tokens are about to have another expert, but sigmoids are not to saturate. What an
# expert adds is smaller than what it is added to, as in trained models, where FP8's rounding disturbs little too.
SOFTMAX_GAIN, SIGMOID_GAIN, DOWN_GAIN, UNEMBEDDING_GAIN = 3.0, 1.5, 0.2, 4.0

QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,  # no multiple of 128: the last blocks of FP8 are smaller, as kv_a_proj_with_mqa's always are
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 32,
    },
    "max_position_embeddings": 128,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}


class Tensors:
    """Collects the tensors of a checkpoint; random numbers come from the bits of PCG64, which NumPy keeps the same."""

    def __init__(self, seed: int, *, is_float: bool) -> None:
        self.bits = np.random.PCG64(seed)
        self.is_float = is_float
        self.tensors: dict[str, Array] = {}

    def uniform(self, *shape: int, deviation: float = 1.0, mean: float = 0.0) -> Array:
        """f32, of this standard deviation."""
        raw = self.bits.random_raw(math.prod(shape)).reshape(shape)
        unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
        return mean + unit * np.float32(deviation * math.sqrt(12))

    def add(self, name: str, values: Array, dtype: Any = ml_dtypes.bfloat16) -> None:
        """A tensor that is not quantised."""
        stored = values.astype(dtype)
        self.tensors[name] = stored.astype(np.float32) if self.is_float else stored

    def add_matrix(self, name: str, rows: int, columns: int, *, is_fp8: bool, gain: float = 1.0) -> None:
        """`{name}.weight` [rows, columns], whose outputs are `gain` times as large as its inputs."""
        values = self.uniform(rows, columns, deviation=gain / math.sqrt(columns))
        if not is_fp8:
            self.add(f"{name}.weight", values)
            return
        scale = np.zeros((-(-rows // 128), -(-columns // 128)), np.float32)
        for i, j in np.ndindex(scale.shape):
            block = values[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            scale[i, j] = np.abs(block).max() / np.float32(448)
        wide = scale.repeat(128, 0)[:rows].repeat(128, 1)[:, :columns]
        quantized = (values / wide).astype(ml_dtypes.float8_e4m3fn)
        if self.is_float:
            self.tensors[f"{name}.weight"] = quantized.astype(np.float32) * wide
        else:
            self.tensors[f"{name}.weight"] = quantized
            self.tensors[f"{name}.weight_scale_inv"] = scale

    def add_norm(self, name: str, size: int) -> None:
        """`{name}.weight` [size], around 1."""
        self.add(f"{name}.weight", self.uniform(size, deviation=0.1, mean=1.0))

    def add_mlp(self, name: str, hidden: int, intermediate: int, factor: float = 1.0) -> None:
        """Gate, up and down projections, of an expert whose results are going to be multiplied by a factor."""
        self.add_matrix(f"{name}.gate_proj", intermediate, hidden, is_fp8=True, gain=1.5)
        self.add_matrix(f"{name}.up_proj", intermediate, hidden, is_fp8=True, gain=1.5)
        self.add_matrix(f"{name}.down_proj", hidden, intermediate, is_fp8=True, gain=DOWN_GAIN / factor)


def qwen3_moe(config: Mapping[str, Any], tensors: Tensors) -> None:
    """All tensors of a Qwen3-MoE checkpoint."""
    h, d, n, k = (config[key] for key in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads"))
    _add_ends(config, tensors)
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.add_norm(f"{stem}.{norm}", h)
        for projection, heads in (("q", n), ("k", k), ("v", k)):
            tensors.add_matrix(f"{stem}.self_attn.{projection}_proj", heads * d, h, is_fp8=True)
        tensors.add_matrix(f"{stem}.self_attn.o_proj", h, n * d, is_fp8=True)
        for norm in ("q_norm", "k_norm"):
            tensors.add_norm(f"{stem}.self_attn.{norm}", d)
        tensors.add_matrix(f"{stem}.mlp.gate", config["num_experts"], h, is_fp8=False, gain=SOFTMAX_GAIN)
        for expert in range(config["num_experts"]):
            tensors.add_mlp(f"{stem}.mlp.experts.{expert}", h, config["moe_intermediate_size"])


def deepseek_v3(config: Mapping[str, Any], tensors: Tensors) -> None:
    """All tensors of a DeepSeek-V3 checkpoint."""
    h, n, q, c = (config[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank"))
    nope, rope, v = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    _add_ends(config, tensors)
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.add_norm(f"{stem}.{norm}", h)
        attention = f"{stem}.self_attn"
        tensors.add_matrix(f"{attention}.q_a_proj", q, h, is_fp8=True)
        tensors.add_norm(f"{attention}.q_a_layernorm", q)
        tensors.add_matrix(f"{attention}.q_b_proj", n * (nope + rope), q, is_fp8=True)
        tensors.add_matrix(f"{attention}.kv_a_proj_with_mqa", c + rope, h, is_fp8=True)
        tensors.add_norm(f"{attention}.kv_a_layernorm", c)
        tensors.add_matrix(f"{attention}.kv_b_proj", n * (nope + v), c, is_fp8=True)
        tensors.add_matrix(f"{attention}.o_proj", h, n * v, is_fp8=True)
        if layer < config["first_k_dense_replace"]:
            tensors.add_mlp(f"{stem}.mlp", h, config["intermediate_size"])
            continue
        num_experts, i = config["n_routed_experts"], config["moe_intermediate_size"]
        tensors.add_matrix(f"{stem}.mlp.gate", num_experts, h, is_fp8=False, gain=SIGMOID_GAIN)
        bias = tensors.uniform(num_experts, deviation=0.1)
        tensors.add(f"{stem}.mlp.gate.e_score_correction_bias", bias, np.float32)
        for expert in range(num_experts):
            tensors.add_mlp(f"{stem}.mlp.experts.{expert}", h, i, config["routed_scaling_factor"])
        tensors.add_mlp(f"{stem}.mlp.shared_experts", h, i * config["n_shared_experts"])


def _add_ends(config: Mapping[str, Any], tensors: Tensors) -> None:
    size = (config["vocab_size"], config["hidden_size"])
    tensors.add("model.embed_tokens.weight", tensors.uniform(*size))
    tensors.add_norm("model.norm", config["hidden_size"])
    tensors.add_matrix("lm_head", *size, is_fp8=False, gain=UNEMBEDDING_GAIN)


MODELS = {"qwen3_moe": (QWEN3_MOE, qwen3_moe), "deepseek_v3": (DEEPSEEK_V3, deepseek_v3)}
SEED = 4


def write(family: str, folder: Path, *, is_float: bool = False) -> str:
    """Writes the family's checkpoint to a folder, which is made; returns the SHA-256 of the file of its tensors."""
    config, fill = MODELS[family]
    tensors = Tensors(SEED, is_float=is_float)
    fill(config, tensors)
    folder.mkdir(parents=True)
    fields = dict(config) if is_float else {**config, "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(fields))
    content = _safetensors(tensors.tensors)
    (folder / "model.safetensors").write_bytes(content)
    return hashlib.sha256(content).hexdigest()


_DTYPES = {"float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16", "float32": "F32"}


def _safetensors(tensors: Mapping[str, Array]) -> bytes:
    """A file of tensors: the length of its header, the header, and the bytes of all tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in tensors.items():
        end = position + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values())
