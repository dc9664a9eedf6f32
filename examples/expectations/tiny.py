"""Tiny random checkpoints of the families, the same bytes wherever they are made: NumPy alone, no torch.

Names and types of tensors are those of published checkpoints: big matrices FP8 with a scale per 128x128 block, the
routed experts of DeepSeek-V4 MXFP4, the rest BF16 or FP32. `write(..., is_float=True)` writes the same values in FP32
instead, for implementations that do not read these.
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
STREAM_FACTOR = 2.0  # With streams, experts weigh more.
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
DEEPSEEK_V4: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 96,
    "o_groups": 4,
    "o_lora_rank": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 6},
    "compress_rope_theta": 160000.0,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 4,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "num_hash_layers": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 3.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 32,
    },
    "max_position_embeddings": 128,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}


class Tensors:
    """Collects the tensors of a checkpoint; random numbers come from the bits of PCG64, which NumPy keeps the same."""

    def __init__(self, seed: int, *, is_float: bool, scale: str = "weight_scale_inv") -> None:
        self.bits = np.random.PCG64(seed)
        self.is_float, self.scale = is_float, scale
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
            self.tensors[f"{name}.{self.scale}"] = scale

    def add_mxfp4(self, name: str, rows: int, columns: int, gain: float) -> None:
        """`{name}.weight` [rows, columns / 2], two E2M1 in a byte, and a power of two for 32 columns of a row."""
        values = self.uniform(rows, columns, deviation=gain / math.sqrt(columns)).reshape(rows, -1, 32)
        # So that the largest one of 32 is at most 6, the largest E2M1.
        exponents = np.frexp(np.abs(values).max(axis=-1, keepdims=True) / np.float32(6))[1]
        scale = np.ldexp(np.float32(1), exponents)
        quantized = (values / scale).astype(ml_dtypes.float4_e2m1fn)
        if self.is_float:
            self.tensors[f"{name}.weight"] = (quantized.astype(np.float32) * scale).reshape(rows, columns)
            return
        codes = quantized.view(np.uint8).reshape(rows, -1) & 15
        self.tensors[f"{name}.weight"] = (codes[:, ::2] | codes[:, 1::2] << 4).view(np.int8)
        self.tensors[f"{name}.scale"] = (exponents[..., 0] + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)

    def add_norm(self, name: str, size: int) -> None:
        """`{name}.weight` [size], around 1."""
        self.add(f"{name}.weight", self.uniform(size, deviation=0.1, mean=1.0))

    def add_mlp(
        self,
        name: str,
        hidden: int,
        intermediate: int,
        factor: float = 1.0,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        is_mxfp4: bool = False,
    ) -> None:
        """Gate, up and down projections, of an expert whose results are going to be multiplied by a factor."""
        sizes = ((intermediate, hidden, 1.5), (intermediate, hidden, 1.5), (hidden, intermediate, DOWN_GAIN / factor))
        for projection, (rows, columns, gain) in zip(names, sizes, strict=True):
            if is_mxfp4:
                self.add_mxfp4(f"{name}.{projection}", rows, columns, gain)
            else:
                self.add_matrix(f"{name}.{projection}", rows, columns, is_fp8=True, gain=gain)


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


def deepseek_v4(config: Mapping[str, Any], tensors: Tensors) -> None:
    """All tensors of a DeepSeek-V4 checkpoint, whose names are its own."""
    h, n, d, q = (config[key] for key in ("hidden_size", "num_attention_heads", "head_dim", "q_lora_rank"))
    groups, rank, streams = (config[key] for key in ("o_groups", "o_lora_rank", "hc_mult"))
    w = ("w1", "w3", "w2")

    def add_streams(stem: str, count: int, num_scales: int) -> None:
        tensors.add(f"{stem}_fn", tensors.uniform(count, streams * h, deviation=(streams * h) ** -0.5), np.float32)
        tensors.add(f"{stem}_base", tensors.uniform(count, deviation=0.5), np.float32)
        tensors.add(f"{stem}_scale", tensors.uniform(num_scales, deviation=0.1, mean=1.0), np.float32)

    def add_compressor(stem: str, rate: int, size: int, series: int) -> None:
        for name in ("wkv", "wgate"):
            tensors.add_matrix(f"{stem}.{name}", series * size, h, is_fp8=False)
        tensors.add(f"{stem}.ape", tensors.uniform(rate, series * size, deviation=0.5), np.float32)
        tensors.add_norm(f"{stem}.norm", size)

    _add_ends(config, tensors, names=("embed", "norm", "head"))
    add_streams("hc_head", streams, 1)
    for layer in range(config["num_hidden_layers"]):
        stem, attention = f"layers.{layer}", f"layers.{layer}.attn"
        for block in ("attn", "ffn"):
            tensors.add_norm(f"{stem}.{block}_norm", h)
            add_streams(f"{stem}.hc_{block}", (2 + streams) * streams, 3)
        tensors.add_matrix(f"{attention}.wq_a", q, h, is_fp8=True)
        tensors.add_norm(f"{attention}.q_norm", q)
        tensors.add_matrix(f"{attention}.wq_b", n * d, q, is_fp8=True)
        tensors.add_matrix(f"{attention}.wkv", d, h, is_fp8=True)
        tensors.add_norm(f"{attention}.kv_norm", d)
        tensors.add_matrix(f"{attention}.wo_a", groups * rank, n * d // groups, is_fp8=True)
        tensors.add_matrix(f"{attention}.wo_b", h, groups * rank, is_fp8=True)
        tensors.add(f"{attention}.attn_sink", tensors.uniform(n), np.float32)
        kind = config["layer_types"][layer]
        rate = config["compress_rates"].get(kind)
        is_sparse = kind == "compressed_sparse_attention"
        if rate:
            add_compressor(f"{attention}.compressor", rate, d, 2 if is_sparse else 1)
        if is_sparse:
            heads, size = config["index_n_heads"], config["index_head_dim"]
            add_compressor(f"{attention}.indexer.compressor", rate, size, 2)
            tensors.add_matrix(f"{attention}.indexer.wq_b", heads * size, q, is_fp8=True)
            tensors.add_matrix(f"{attention}.indexer.weights_proj", heads, h, is_fp8=False)
        num_experts, i, k = (
            config[f"{key}"] for key in ("n_routed_experts", "moe_intermediate_size", "num_experts_per_tok")
        )
        tensors.add_matrix(f"{stem}.ffn.gate", num_experts, h, is_fp8=False, gain=SIGMOID_GAIN)
        if layer < config["num_hash_layers"]:
            # k different ones of each token: a start of its own, and steps that no sum of brings back to it.
            start = (tensors.uniform(config["vocab_size"]) * 1000).astype(np.int64)[:, None]
            tensors.tensors[f"{stem}.ffn.gate.tid2eid"] = (start + 3 * np.arange(k)) % num_experts
        else:
            tensors.add(f"{stem}.ffn.gate.bias", tensors.uniform(num_experts, deviation=0.1), np.float32)
        for expert in range(num_experts):
            tensors.add_mlp(
                f"{stem}.ffn.experts.{expert}", h, i, STREAM_FACTOR * config["routed_scaling_factor"], w, is_mxfp4=True
            )
        tensors.add_mlp(f"{stem}.ffn.shared_experts", h, i, STREAM_FACTOR, w)


def _add_ends(
    config: Mapping[str, Any],
    tensors: Tensors,
    names: tuple[str, str, str] = ("model.embed_tokens", "model.norm", "lm_head"),
) -> None:
    size = (config["vocab_size"], config["hidden_size"])
    tensors.add(f"{names[0]}.weight", tensors.uniform(*size))
    tensors.add_norm(names[1], config["hidden_size"])
    tensors.add_matrix(names[2], *size, is_fp8=False, gain=UNEMBEDDING_GAIN)


# Configuration, what fills it, and a seed: of several one with which few choices, of experts, groups or entries, are so
# close that FP8 decides them.
MODELS = {
    "qwen3_moe": (QWEN3_MOE, qwen3_moe, 4),
    "deepseek_v3": (DEEPSEEK_V3, deepseek_v3, 4),
    "deepseek_v4": (DEEPSEEK_V4, deepseek_v4, 6),
}


def write(family: str, folder: Path, *, is_float: bool = False) -> str:
    """Writes the family's checkpoint to a folder, which is made; returns the SHA-256 of the file of its tensors."""
    config, fill, seed = MODELS[family]
    tensors = Tensors(seed, is_float=is_float, scale="scale" if family == "deepseek_v4" else "weight_scale_inv")
    fill(config, tensors)
    folder.mkdir(parents=True)
    fields = dict(config) if is_float else {**config, "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(fields))
    content = safetensors_bytes(tensors.tensors)
    (folder / "model.safetensors").write_bytes(content)
    return hashlib.sha256(content).hexdigest()


_DTYPES = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "bfloat16": "BF16",
    "float32": "F32",
    "int64": "I64",
    "int8": "I8",
    "uint8": "U8",
}


def safetensors_bytes(tensors: Mapping[str, Array]) -> bytes:
    """A file of tensors: the length of its header, the header, and the bytes of all tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in tensors.items():
        end = position + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values())
