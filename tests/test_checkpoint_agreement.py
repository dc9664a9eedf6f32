"""What config.json says of layers and sizes against what the tensors have: each contradiction is named, in each family."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jax_megamoe as mm
from jax_megamoe.checkpoints import Checkpoint, convert
from jax_megamoe.checkpoints.safetensors import Tensor
from jax_megamoe.errors import CheckpointError
from tests.support.checkpoints import VOCABULARY, E, Plan, build, write
from tests.support.families import PLANS

Call = Callable[[Checkpoint], object]
Folder = Callable[..., Path]
# Of models that have no other networks.
ONLY_SIZE = ("minimax_m2", "gpt_oss")
NUMBERS = ("n_routed_experts", "num_experts", "num_local_experts")
COUNTS = ("num_experts_per_tok", "num_experts_per_token")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Folder:
    """The checkpoint of a plan, whose config.json has these fields, and lacks those that are None."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def change(name: str, **fields: Any) -> Path:
        if name not in made:
            stock = build(PLANS[name])
            made[name] = write(tmp_path_factory.mktemp(name), stock.config, stock.tensors), stock.config
        folder, config = made[name]
        text = {**config.get("text_config", config), **fields}
        text = {key: value for key, value in text.items() if value is not None}
        (folder / "config.json").write_text(
            json.dumps({**config, "text_config": text} if PLANS[name].text_config else text)
        )
        return folder

    return change


def experts(checkpoint: Checkpoint) -> object:
    return checkpoint.experts(checkpoint.moe_layers[-1])


def shared(checkpoint: Checkpoint) -> object:
    return checkpoint.shared_experts(checkpoint.moe_layers[-1])


def router(checkpoint: Checkpoint) -> object:
    return checkpoint.router(checkpoint.moe_layers[-1])


def opened(checkpoint: Checkpoint) -> object:
    return pytest.fail("was opened")


def said_of(plan: Plan) -> dict[str, Any]:
    sizes = {"hidden_size": plan.model_size, "moe_intermediate_size": plan.intermediate_size}
    if plan.family in ONLY_SIZE:
        del sizes["moe_intermediate_size"]
    return {"num_hidden_layers": plan.num_layers, **sizes, **plan.config}


def contradictions(plan: Plan) -> Iterator[tuple[dict[str, Any], Call, str]]:
    """Fields, who finds them wrong, and what is said."""
    said = said_of(plan)
    h, i = plan.hidden_size, plan.intermediate_size
    size = "intermediate_size" if plan.family in ONLY_SIZE else "moe_intermediate_size"
    for wrong in (2 * i, i + 32):
        yield {size: wrong}, experts, f"intermediate size is {i}, wanted {size} = {wrong} of config.json: look whether"
    for wrong in (plan.model_size // 2, plan.model_size + 64):
        if "routed_expert_hidden_size" not in said:
            yield {"hidden_size": wrong}, experts, f"wanted the hidden size {wrong} of config.json: look whether"
        yield {"hidden_size": wrong}, router, rf"wanted floats \[8, {wrong}\]: look whether config.json is its own"
    if "routed_expert_hidden_size" in said:
        yield {"routed_expert_hidden_size": 2 * h}, experts, f"wanted the hidden size {2 * h} of config.json"
        yield {"hidden_size": h}, shared, f"hidden size is {plan.model_size}, wanted hidden_size = {h} of config.json"
    for key in (key for key in NUMBERS if key in said):
        few, many = {key: E // 2}, {key: 2 * E}
        if plan.fused:
            yield few, experts, rf"has shape \(8, .*\), wanted \[{E // 2}, N, K\]"
            yield many, experts, rf"has shape \(8, .*\), wanted \[{2 * E}, N, K\]"
        else:
            yield few, opened, f"has 4 experts, and layer {plan.moe_layers[0]} of the files has number 7"
            yield many, experts, r"experts\.8\.\w+\.weight(_packed)?' is missing"
    key = next(key for key in COUNTS if key in said)
    yield {key: E + 1}, router, f"has {key} = 9, wanted at most the [48] experts"
    if said.get("n_group", 1) > 1:
        yield {"n_group": 3}, router, "has n_group = 3 and topk_group = 2, wanted a divisor of its 8 experts"
        yield {"topk_group": 5}, router, "has n_group = 4 and topk_group = 5, wanted .* and at most that"
        yield (
            {"topk_group": 1, key: 3},
            router,
            f"has {key} = 3, wanted at most the 2 experts that 1 of its groups have",
        )
    for key in (key for key in ("n_shared_experts", "num_shared_experts") if said.get(key)):
        for wrong in (0, 1 + plan.num_shared):
            total = plan.num_shared * i
            yield (
                {key: wrong},
                shared,
                rf"size of {total}, wanted {key} = {wrong} times the {i} of an expert, by config",
            )
    if "shared_expert_intermediate_size" in said:
        for wrong in (0, 2 * i):
            text = f"intermediate size of {i}, wanted shared_expert_intermediate_size = {wrong} by config.json: look"
            yield {"shared_expert_intermediate_size": wrong}, shared, text
    # Which layer of the files is beyond what is said; DeepSeek-V3's has one more than the others.
    last = plan.num_layers - 1 + plan.has_mtp
    for key in ("num_nextn_predict_layers", "num_mtp_layers") if last > 1 else ():
        beyond = {"num_hidden_layers": last - 1, key: 1}
        text = f"has num_hidden_layers = {last - 1} and {key} = 1, and layer {last} of the files"
        yield beyond, opened, text
    no_experts = "says that layer 1 has no experts, and the files have some: look whether"
    kinds: dict[str, Any] = {"mlp_layer_types": ["moe" if layer != 1 else "dense" for layer in range(plan.num_layers)]}
    others: dict[str, Any] = {"first_k_dense_replace": 2, "moe_layer_freq": [1, 0, 1], "mlp_only_layers": [1]}
    for fields in (kinds, *({key: value} for key, value in others.items() if key in said)):
        yield fields, opened, no_experts


CASES = [
    pytest.param(
        name, *case, id=f"{name}-{'-'.join(f'{key}={value}' for key, value in case[0].items())}-{case[1].__name__}"
    )
    for name, plan in PLANS.items()
    for case in contradictions(plan)
]


@pytest.mark.parametrize("name, fields, call, text", CASES)
def test_what_the_tensors_lack_is_named(name, fields, call, text, folder_of, monkeypatch):
    folder = folder_of(name, **fields)
    if call in (experts, shared):
        monkeypatch.setattr(Tensor, "array", lambda *_: pytest.fail("was read"))
    with pytest.raises(CheckpointError, match=text) as caught:
        call(mm.read_checkpoint(folder))
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("value", [-1, 1 << 31, 10**4000, 2.5, "256", True, [256]])
@pytest.mark.parametrize("key", ["moe_intermediate_size", "hidden_size", "n_shared_experts", "num_mtp_layers"])
def test_what_is_no_size(key, value, folder_of):
    folder = folder_of("deepseek-v3", **{key: value})
    with pytest.raises(CheckpointError, match=f"has {key} = ") as caught:
        checkpoint = mm.read_checkpoint(folder)
        checkpoint.experts(1)
        checkpoint.shared_experts(1)
    assert len(str(caught.value)) < 400 + len(str(folder))


@pytest.mark.parametrize("name", PLANS)
def test_what_config_does_not_say_is_taken_from_the_tensors(name, folder_of):
    sizes = ("moe_intermediate_size", "intermediate_size", "shared_expert_intermediate_size")
    others = ("n_shared_experts", "num_shared_experts", "num_hash_layers", "num_nextn_predict_layers")
    folder, plan = folder_of(name, **dict.fromkeys((*sizes, *others))), PLANS[name]
    checkpoint = mm.read_checkpoint(folder)
    layer = plan.moe_layers[-1]
    assert checkpoint.experts(layer).intermediate_size == plan.intermediate_size
    found = checkpoint.shared_experts(layer)
    assert (found is not None) == (plan.shared is not None)
    assert found is None or found.num_experts == plan.num_shared
    for number in plan.moe_layers:
        assert (checkpoint.router(number).hash_table is not None) == (number < plan.hash_layers)


@pytest.mark.parametrize("value", [None, 0, 1, 3])
def test_layers_of_multi_token_prediction_may_be_in_the_files(value, folder_of):
    assert PLANS["deepseek-v3"].has_mtp
    checkpoint = mm.read_checkpoint(folder_of("deepseek-v3", num_nextn_predict_layers=value))
    assert checkpoint.moe_layers == [1, 2]


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if plan.moe_layers[0] > 0])
def test_which_layers_are_dense_has_to_be_said(name, folder_of):
    keys = ("mlp_layer_types", "moe_layer_freq", "first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers")
    first = PLANS[name].moe_layers[0]
    text = f"does not say which layers are dense, .*: give it first_k_dense_replace = {first}, or download all files"
    with pytest.raises(CheckpointError, match=text):
        mm.read_checkpoint(folder_of(name, **dict.fromkeys(keys)))
    folder = folder_of(name, **{**dict.fromkeys(keys), "first_k_dense_replace": first})
    assert mm.read_checkpoint(folder).moe_layers == list(PLANS[name].moe_layers)


@pytest.mark.parametrize("key, values", [("mlp_layer_types", ["dense", "sparse"]), ("moe_layer_freq", [0, 1])])
def test_a_list_of_layers_has_all_of_them(key, values, folder_of):
    with pytest.raises(CheckpointError, match=f"has {key} of 2 layers, wanted all 3: take it from its source."):
        mm.read_checkpoint(folder_of("deepseek-v3", **{key: values}))


@pytest.mark.parametrize(
    "key, value",
    [
        ("mlp_only_layers", "0"),
        ("mlp_only_layers", {"0": 1}),
        ("decoder_sparse_step", 1.5),
        ("decoder_sparse_step", [1]),
        ("moe_layer_freq", True),
        ("mlp_layer_types", "dense"),
    ],
    ids=str,
)
def test_what_says_nothing_of_layers(key, value, folder_of):
    with pytest.raises(CheckpointError, match=f"has {key} = .*: look what it should be."):
        mm.read_checkpoint(folder_of("deepseek-v3", **{key: value}))


def test_the_groups_of_deepseek_v3_have_to_be_said(folder_of):
    checkpoint = mm.read_checkpoint(folder_of("deepseek-v3", n_group=None, topk_group=None))
    with pytest.raises(CheckpointError, match="has no n_group, wanted how many groups its experts are in"):
        checkpoint.router(1)
    assert "num_groups" not in mm.read_checkpoint(folder_of("deepseek-v3", n_group=1)).router(1).options


def test_glm_flash_has_the_names_of_its_family(folder_of):
    lite, full = (mm.read_checkpoint(folder_of("glm-4.5", model_type=f"glm4_moe{end}")) for end in ("_lite", ""))
    assert lite.family == full.family == "glm4_moe"
    assert lite.router(1).options == full.router(1).options


def test_a_table_of_experts_for_other_tokens_or_layers(folder_of):
    for size in (VOCABULARY, VOCABULARY - 1):  # it may have rows that no token asks for
        assert mm.read_checkpoint(folder_of("deepseek-v4", vocab_size=size)).router(0).hash_table is not None
    checkpoint = mm.read_checkpoint(folder_of("deepseek-v4", vocab_size=VOCABULARY + 1))
    with pytest.raises(CheckpointError, match="has 16 rows, wanted one for each of vocab_size = 17 of config.json"):
        checkpoint.router(0)
    checkpoint = mm.read_checkpoint(folder_of("deepseek-v4", num_experts_per_tok=3))
    with pytest.raises(CheckpointError, match=r"is I64 \(16, 2\), wanted integers \[vocabulary, 3\]"):
        checkpoint.router(0)
    checkpoint = mm.read_checkpoint(folder_of("deepseek-v4", num_hash_layers=0))
    with pytest.raises(
        CheckpointError, match="chooses the experts of layer 0, which by config.json chooses them by sco"
    ):
        checkpoint.router(0)
    checkpoint = mm.read_checkpoint(folder_of("deepseek-v4", num_hash_layers=2))
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.gate\.tid2eid' is missing"):
        checkpoint.router(1)


@pytest.mark.parametrize(
    "fields", [{"moe_intermediate_size": 64}, {"n_shared_experts": 2}, {"num_experts_per_tok": E + 1}]
)
def test_convert_writes_nothing(fields, folder_of, tmp_path):
    with pytest.raises(CheckpointError):
        convert(folder_of("deepseek-v3", **fields), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
