"""What a checkpoint has for a layer besides experts: a wrong router, or shared experts, are a named error."""

import numpy as np
import pytest

from jax_megamoe.errors import CheckpointError
from tests.support.changed_checkpoints import Change, all_of, make, with_config, with_tensor, without
from tests.support.checkpoints import E, H
from tests.support.families import PLANS

OTHERS: dict[str, tuple[str, Change, str, str]] = {
    "router missing": ("kimi-k2", without("model.layers.1.mlp.gate.weight"), "router", r"mlp\.gate\.weight' is missing"),
    "router of another size": (
        "kimi-k2",
        with_tensor("model.layers.1.mlp.gate.weight", np.zeros((E + 1, H), np.float32)),
        "router",
        r"is F32 \(9, 256\), wanted floats \[8, 256\]",
    ),
    "bias missing": (
        "kimi-k2",
        without("model.layers.1.mlp.gate.e_score_correction_bias"),
        "router",
        "e_score_correction_bias' is missing",
    ),
    "bias of integers": (
        "kimi-k2",
        with_tensor("model.layers.1.mlp.gate.e_score_correction_bias", np.zeros(E, np.int32)),
        "router",
        r"is I32 \(8,\), wanted floats \[8\]",
    ),
    "scoring": ("kimi-k2", with_config(scoring_func="tanh"), "router", "has scoring 'tanh'"),
    "top_k": ("kimi-k2", with_config(num_experts_per_tok=0), "router", "num_experts_per_tok = 0"),
    "activation": ("kimi-k2", with_config(hidden_act="gelu"), "moe_options", "hidden_act = 'gelu', wanted 'silu'"),
    "shared missing": (
        "kimi-k2",
        without("model.layers.1.mlp.shared_experts.gate_proj.weight"),
        "shared_experts",
        r"shared_experts\.gate_proj\.weight' is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_belongs_to_the_layer(name, tmp_path):
    plan, change, method, text = OTHERS[name]
    checkpoint = make(tmp_path, plan, change)
    with pytest.raises(CheckpointError, match=text):
        getattr(checkpoint, method)(1)


@pytest.mark.parametrize("name, found", [("qwen3-bf16", False), ("kimi-k2", True)])
def test_what_is_meant_where_the_configuration_does_not_say(name, found, tmp_path):
    checkpoint = make(tmp_path, name, lambda config, _: config.pop("norm_topk_prob"))
    assert checkpoint.router(1).options["renormalize"] is found


def test_a_bias_that_the_configuration_rules_out_may_be_missing(tmp_path):
    for name, fields in (("kimi-k2", {"topk_method": "greedy"}), ("minimax-m2", {"use_routing_bias": False})):
        stem = PLANS[name]
        bias = f"model.layers.1.{stem.block}.{stem.bias}"
        checkpoint = make(tmp_path / name, name, all_of(without(bias), with_config(**fields)))
        assert checkpoint.router(1).bias is None


@pytest.mark.parametrize(
    "table, text",
    [
        (np.full((4, 2), E), "names experts 8 to 8, wanted 0 to 7"),
        (np.zeros((4, 3), np.int64), r"wanted integers .*, 2\]"),
    ],
)
def test_hash_tables_that_lead_astray(table, text, tmp_path):
    checkpoint = make(tmp_path, "deepseek-v4", with_tensor("layers.0.ffn.gate.tid2eid", table))
    with pytest.raises(CheckpointError, match=text):
        checkpoint.router(0)


@pytest.mark.parametrize("fields", [{}, {"num_hash_layers": None, "mlp_layer_types": ["hash_moe", "moe", "moe"]}])
def test_a_hash_layer_without_its_table(fields, tmp_path):
    change = all_of(without("layers.0.ffn.gate.tid2eid"), with_config(**fields))
    checkpoint = make(tmp_path, "deepseek-v4", change)
    with pytest.raises(CheckpointError, match="tid2eid' is missing"):
        checkpoint.router(0)


@pytest.mark.parametrize(
    "missing", [["shared_expert.gate_proj.weight"], ["shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"]]
)
def test_a_shared_expert_that_is_not_all_there(missing, tmp_path):
    stem = "model.language_model.layers.1.mlp"
    changes = [without(f"{stem}.{name}") for name in missing]
    with pytest.raises(CheckpointError, match=f"{missing[0]}.* is missing"):
        make(tmp_path, "qwen3.5-bf16", all_of(*changes)).shared_experts(1)


def test_a_gate_of_the_shared_expert_that_is_missing(tmp_path):
    change = without("model.language_model.layers.1.mlp.shared_expert_gate.weight")
    with pytest.raises(CheckpointError, match="shared_expert_gate.weight.* is missing"):
        make(tmp_path, "qwen3.5-bf16", change).router(1)


@pytest.mark.parametrize(
    ("fields", "has_bias", "groups"),
    [
        ({}, True, {"num_groups": 4, "top_groups": 2, "group_scoring": "sum_of_two"}),
        ({"topk_method": "group_limited_greedy"}, False, {"num_groups": 4, "top_groups": 2, "group_scoring": "max"}),
        ({"topk_method": "greedy"}, False, {}),
    ],
)
def test_the_configuration_has_the_last_word_on_how_experts_are_chosen(fields, has_bias, groups, tmp_path):
    router = make(tmp_path, "deepseek-v3", with_config(**fields)).router(1)
    assert (router.bias is not None) is has_bias
    assert {name: value for name, value in router.options.items() if "group" in name} == groups


@pytest.mark.parametrize(
    ("name", "fields", "text"),
    [
        ("deepseek-v3", {"topk_method": "fair"}, "has topk_method = 'fair', wanted one of noaux_tc, "),
        ("hy3", {"moe_router_use_sigmoid": False}, "has moe_router_use_sigmoid = False, wanted True"),
    ],
)
def test_ways_to_choose_experts_that_there_are_not(name, fields, text, tmp_path):
    with pytest.raises(CheckpointError, match=text):
        make(tmp_path, name, with_config(**fields)).router(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_no_numbers(value, tmp_path):
    for number, name in enumerate(("routed_scaling_factor", "swiglu_limit")):
        with pytest.raises(CheckpointError, match="wanted a finite number"):
            make(tmp_path / str(number), "deepseek-v4", with_config(**{name: value})).moe_options(1)
