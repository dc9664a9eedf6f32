"""The families of models, each with the encodings that it is published in: `PLANS` by a name for the test."""

from typing import Any

import jax_megamoe as mm
from tests.support.checkpoints import (
    E,
    H,
    I,
    K,
    Plan,
    floats,
    fp8_block,
    fp8_channel,
    fp8_matrix,
    fp8_small_blocks,
    mxfp4,
)

_SIGMOID = {"scoring": "sigmoid", "renormalize": True}
_CORRECTION = "gate.e_score_correction_bias"
_W = ("w1", "w3", "w2")


def _deepseek(model_type: str, factor: float = 2.5, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "n_routed_experts": E,
        "num_experts_per_tok": K,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": factor,
        **fields,
    }


_GROUPS = {"num_groups": 4, "top_groups": 2, "group_scoring": "sum_of_two"}
_V3: dict[str, Any] = {
    "bias": _CORRECTION,
    "shared": "shared_experts",
    "route": {**_SIGMOID, **_GROUPS},
    "moe": {"routed_scaling_factor": 2.5},
}
_V4_CONFIG = {
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "n_shared_experts": 1,
    "num_hash_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
}
_V4: dict[str, Any] = {
    "prefix": "",
    "block": "ffn",
    "expert": _W,
    "bias": "gate.bias",
    "hash_table": "gate.tid2eid",
    "hash_layers": 1,
    "shared": "shared_experts",
    "shared_expert": _W,
    "shared_encode": fp8_block("E8M0", ".scale"),
    "moe_layers": (0, 1, 2),
    "route": {"scoring": "sqrtsoftplus", "renormalize": True},
    "moe": {"activation_clamp": 10.0, "routed_scaling_factor": 1.5},
}
_QWEN = {
    "model_type": "qwen3_moe",
    "num_experts": E,
    "num_experts_per_tok": K,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}
_QWEN_5 = {
    "model_type": "qwen3_5_moe",
    "num_experts": E,
    "num_experts_per_tok": K,
    "shared_expert_intermediate_size": I,
}
_SOFTMAX = {"scoring": "softmax", "renormalize": True}
_GATED: dict[str, Any] = {"shared": "shared_expert", "shared_gate": "shared_expert_gate.weight", "route": _SOFTMAX}
_LANGUAGE = "model.language_model."
_GLM: dict[str, Any] = {
    "bias": _CORRECTION,
    "shared": "shared_experts",
    "route": _SIGMOID,
    "moe": {"routed_scaling_factor": 2.5},
}
_UNGROUPED = {"n_group": 1, "topk_group": 1}
_MINIMAX = {
    "model_type": "minimax_m2",
    "num_local_experts": E,
    "num_experts_per_tok": K,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "intermediate_size": I,
}
_MIMO = {
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "n_shared_experts": None,
    "moe_layer_freq": [0, 1, 1],
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": None,
    **_UNGROUPED,
}
_HY3 = {
    "model_type": "hy_v3",
    "num_experts": E,
    "num_experts_per_tok": K,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_router_enable_expert_bias": True,
    "moe_router_use_sigmoid": True,
    "route_norm": True,
    "router_scaling_factor": 2.826,
}
_HY3_NAMES: dict[str, Any] = {
    "router": "router.gate.weight",
    "bias": "expert_bias",
    "shared": "shared_mlp",
    "route": _SIGMOID,
    "moe": {"routed_scaling_factor": 2.826},
}
_K3 = {
    "model_type": "kimi_k3",
    "num_experts": E,
    "num_experts_per_token": K,
    "num_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_expert_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "routed_expert_hidden_size": H,
    "hidden_act": "situ",
    "activation_situ_beta": 4.0,
    "activation_situ_linear_beta": 25.0,
}

# As 2880 none of these is a multiple of 128.
_GPT_OSS_H, _GPT_OSS_I = 224, 160
_GPT_OSS = {
    "model_type": "gpt_oss",
    "num_local_experts": E,
    "num_experts_per_tok": K,
    "experts_per_token": K,
    "intermediate_size": _GPT_OSS_I,
    "swiglu_limit": 7.0,
    "layer_types": ["sliding_attention", "full_attention"],
    "quantization_config": {"quant_method": "mxfp4"},
}

PLANS: dict[str, Plan] = {
    "deepseek-v3": Plan(
        "deepseek_v3", _deepseek("deepseek_v3", n_group=4, topk_group=2), fp8_block(), has_mtp=True, **_V3
    ),
    "deepseek-v3.2": Plan("deepseek_v3", _deepseek("deepseek_v32", n_group=4, topk_group=2), fp8_block("E8M0"), **_V3),
    "kimi-k2": Plan(
        "kimi_k2",
        _deepseek("kimi_k2", 2.827, **_UNGROUPED),
        fp8_block(),
        **{**_GLM, "moe": {"routed_scaling_factor": 2.827}},
    ),
    "deepseek-v4": Plan("deepseek_v4", {"model_type": "deepseek_v4", **_V4_CONFIG}, mxfp4(), **_V4),
    "deepseek-v4-base": Plan(
        "deepseek_v4",
        {"model_type": "deepseek_v4", **_V4_CONFIG},
        fp8_block("f32", ".scale"),
        **{**_V4, "shared_encode": None},
    ),
    "deepseek-v4.1": Plan(
        "deepseek_v4",
        {"model_type": "deepseek_v41", **_V4_CONFIG, "num_hash_layers": 0},
        mxfp4(),
        text_config=True,
        **{**_V4, "image_bias": "gate.bias_vl", "hash_layers": 0, "shared_encode": fp8_small_blocks},
    ),
    "deepseek-v4-transformers": Plan(
        "deepseek_v4",
        {"model_type": "deepseek_v4", **_V4_CONFIG},
        floats,
        **{
            **_V4,
            "prefix": "model.",
            "block": "mlp",
            "bias": _CORRECTION,
            "shared_expert": ("gate_proj", "up_proj", "down_proj"),
            "shared_encode": None,
            "fused": "out_in",
        },
    ),
    "qwen3-fp8": Plan("qwen3_moe", _QWEN, fp8_block("bf16"), route=_SOFTMAX),
    "qwen3-bf16": Plan("qwen3_moe", _QWEN, floats, route=_SOFTMAX),
    "qwen3.5-bf16": Plan(
        "qwen3_5_moe",
        _QWEN_5,
        floats,
        text_config=True,
        prefix=_LANGUAGE,
        fused="out_in",
        moe_layers=(0, 1, 2),
        **_GATED,
    ),
    "qwen3.5-transposed": Plan(
        "qwen3_5_moe",
        _QWEN_5,
        floats,
        text_config=True,
        prefix=_LANGUAGE,
        fused="in_out",
        moe_layers=(0, 1, 2),
        **_GATED,
    ),
    "qwen3.6-fp8": Plan(
        "qwen3_5_moe",
        _QWEN_5,
        fp8_block("bf16"),
        text_config=True,
        prefix=_LANGUAGE,
        moe_layers=(0, 1, 2),
        **_GATED,
    ),
    "glm-4.5": Plan("glm4_moe", _deepseek("glm4_moe", **_UNGROUPED), fp8_channel(), **_GLM),
    "glm-4.5-air": Plan(
        "glm4_moe",
        _deepseek("glm4_moe", 1.0, **_UNGROUPED),
        fp8_channel("f32", trailing=False),
        **{**_GLM, "moe": {"routed_scaling_factor": 1.0}},
    ),
    "glm-5": Plan("glm5", _deepseek("glm_moe_dsa", **_UNGROUPED), fp8_block(), **_GLM),
    "glm-5.3": Plan(
        "glm5",
        _deepseek("glm5_next", swiglu_limit=10.0, **_UNGROUPED),
        fp8_block(),
        text_config=True,
        prefix=_LANGUAGE,
        **{**_GLM, "moe": {"routed_scaling_factor": 2.5, "activation_clamp": 10.0}},
    ),
    "kimi-k3": Plan(
        "kimi_k3",
        _K3,
        mxfp4("uint8", "uint8", ".weight_packed", ".weight_scale"),
        text_config=True,
        prefix="language_model.model.",
        block="block_sparse_moe",
        expert=_W,
        bias=_CORRECTION,
        shared="shared_experts",
        shared_encode=floats,
        num_shared=2,
        model_size=2 * H,
        route=_SIGMOID,
        moe={"routed_scaling_factor": 2.5, "activation": mm.SiTU(4.0, 25.0)},
    ),
    "minimax-m2": Plan(
        "minimax_m2",
        _MINIMAX,
        fp8_block(),
        block="block_sparse_moe",
        expert=_W,
        bias="e_score_correction_bias",
        moe_layers=(0, 1, 2),
        route=_SIGMOID,
    ),
    "mimo-v2-flash": Plan(
        "mimo_v2", {"model_type": "mimo_v2_flash", **_MIMO}, fp8_block(), bias=_CORRECTION, route=_SIGMOID
    ),
    "mimo-v2.6": Plan(
        "mimo_v2",
        {"model_type": "mimo_v2", **_MIMO},
        mxfp4("uint8", "uint8", ".weight", ".weight_scale"),
        bias=_CORRECTION,
        route=_SIGMOID,
    ),
    "hy3": Plan("hy_v3", _HY3, floats, **_HY3_NAMES),
    "hy3-fp8": Plan("hy_v3", _HY3, fp8_matrix(), **_HY3_NAMES),
    "hy3-transformers": Plan(
        "hy_v3",
        _HY3,
        floats,
        fused="out_in",
        **{**_HY3_NAMES, "router": "gate.weight", "bias": "e_score_correction_bias", "shared": "shared_experts"},
    ),
    "gpt-oss": Plan(
        "gpt_oss",
        _GPT_OSS,
        mxfp4("uint8", "uint8", "_blocks", "_scales", largest=127),
        fused="in_turn",
        router="router.weight",
        logit_bias="router.bias",
        moe_layers=(0, 1),
        num_layers=2,
        hidden_size=_GPT_OSS_H,
        model_size=_GPT_OSS_H,
        intermediate_size=_GPT_OSS_I,
        route=_SOFTMAX,
        moe={"activation": mm.SwiGLU(alpha=1.702, up_offset=1.0), "activation_clamp": 7.0},
    ),
}
