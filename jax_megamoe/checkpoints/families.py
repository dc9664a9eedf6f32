"""The families of models whose checkpoints are read: a table of names, and what their configurations say of a layer.

To serve another family, add a row to `FAMILIES` and, where its configuration has words of its own, to `_KEYS`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jax_megamoe.activations import SwiGLU
from jax_megamoe.arrays import text_of
from jax_megamoe.errors import CheckpointError
from jax_megamoe.routing_arrays import Scoring

Projections = tuple[str, str, str]  # the names of gate, up and down

_PROJ: Projections = ("gate_proj", "up_proj", "down_proj")
_W: Projections = ("w1", "w3", "w2")


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps the tensors of an expert layer, below `{prefix}layers.{layer}.{block}.`.

    Experts are `experts.{e}.{projection}`, or `experts.gate_up_proj` and `experts.down_proj` of all of them.
    """

    name: str
    model_types: tuple[str, ...]  # `model_type` of config.json, or of its text_config
    block: str = "mlp"
    expert: Projections = _PROJ
    is_interleaved: bool = False  # whether rows of gate and up are in turn, always in tensors of all experts
    has_expert_bias: bool = False  # whether biases are added to the projections, likewise
    router: str = "gate.weight"
    logit_bias: str | None = None  # added to the logits
    bias: str | None = None  # added for the selection only
    image_bias: str | None = None  # takes the place of `bias` for tokens of images
    hash_table: str | None = None
    shared: str | None = None
    shared_expert: Projections = _PROJ
    shared_gate: str | None = None
    scoring: Scoring = "softmax"  # where the configuration does not say, and likewise
    renormalize: bool = True
    clamp: float | None = None
    activation: SwiGLU | None = None  # what "silu" of the configuration stands for, if not for itself
    size: str = "size"  # the key of `_KEYS` by which the configuration has an expert's intermediate size
    has_groups: bool = True  # whether the configuration's groups of experts are used
    states_groups: bool = False  # whether it has to say how many: code that loads it has eight if it does not
    refusal: str | None = None

    @property
    def has_dense_layers(self) -> bool:
        """Whether models may have layers without experts, to which `intermediate_size` belongs then."""
        return self.size != "only_size"


_CORRECTION = "gate.e_score_correction_bias"

# From the files that the models' owners publish: configurations, indices of tensors, and code that loads them. Rows of
# one name are one family with other names for its tensors, the owner's and those that transformers writes.
FAMILIES = (
    # DeepSeek-V3, R1, V3.1 and V3.2.
    Family(
        "deepseek_v3",
        ("deepseek_v3", "deepseek_v32"),
        bias=_CORRECTION,
        shared="shared_experts",
        scoring="sigmoid",
        states_groups=True,
    ),
    # Its architecture is DeepSeek-V3's. K2-Thinking, K2.5 and later are INT4, which is refused.
    Family("kimi_k2", ("kimi_k2", "kimi_k25"), bias=_CORRECTION, shared="shared_experts", scoring="sigmoid"),
    # Names of the files of DeepSeek-V4-Flash and -Pro; V4.1's are the same, its configuration is in text_config.
    Family(
        "deepseek_v4",
        ("deepseek_v4", "deepseek_v41", "deepseek_v4.1", "deepseek_v41_text", "deepseek_v4.1_text"),
        block="ffn",
        expert=_W,
        bias="gate.bias",
        image_bias="gate.bias_vl",
        hash_table="gate.tid2eid",
        shared="shared_experts",
        shared_expert=_W,
        scoring="sqrtsoftplus",
        has_groups=False,
    ),
    Family(
        "deepseek_v4",
        ("deepseek_v4",),
        bias=_CORRECTION,
        hash_table="gate.tid2eid",
        shared="shared_experts",
        scoring="sqrtsoftplus",
        has_groups=False,
    ),
    Family("qwen3_moe", ("qwen3_moe",), renormalize=False),
    # Qwen3-Next, Qwen3.5 and 3.6: one shared expert, times the sigmoid of a gate. BF16 files hold all experts in two
    # tensors.
    Family(
        "qwen3_5_moe",
        ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_6_moe", "qwen3_next"),
        shared="shared_expert",
        shared_gate="shared_expert_gate.weight",
    ),
    # GLM-4.5, 4.6 and 4.7; 4.7-Flash is glm4_moe_lite, with another attention.
    Family("glm4_moe", ("glm4_moe", "glm4_moe_lite"), bias=_CORRECTION, shared="shared_experts", scoring="sigmoid"),
    # GLM-5, 5.1 and 5.2; GLM-5.3 is glm5_next.
    Family(
        "glm5",
        ("glm_moe_dsa", "glm5_next", "glm5_next_text"),
        bias=_CORRECTION,
        shared="shared_experts",
        scoring="sigmoid",
    ),
    # Its routed experts are `routed_expert_hidden_size` wide; the model projects down to it and up again.
    Family(
        "kimi_k3",
        ("kimi_k3", "kimi_linear"),
        block="block_sparse_moe",
        expert=_W,
        bias=_CORRECTION,
        shared="shared_experts",
        scoring="sigmoid",
    ),
    Family(
        "minimax_m2",
        ("minimax_m2",),
        block="block_sparse_moe",
        expert=_W,
        bias="e_score_correction_bias",
        scoring="sigmoid",
        size="only_size",
    ),
    Family("minimax_m2", ("minimax_m2",), bias="e_score_correction_bias", scoring="sigmoid", size="only_size"),
    # MiMo-V2 has no shared experts, but for what its configuration allows.
    Family("mimo_v2", ("mimo_v2", "mimo_v2_flash"), bias=_CORRECTION, shared="shared_experts", scoring="sigmoid"),
    Family(
        "hy_v3", ("hy_v3",), router="router.gate.weight", bias="expert_bias", shared="shared_mlp", scoring="sigmoid"
    ),
    Family("hy_v3", ("hy_v3",), bias="e_score_correction_bias", shared="shared_experts", scoring="sigmoid"),
    # The numbers are those of openai/gpt-oss, `gpt_oss/torch/model.py`.
    Family(
        "gpt_oss",
        ("gpt_oss",),
        is_interleaved=True,
        has_expert_bias=True,
        router="router.weight",
        logit_bias="router.bias",
        clamp=7.0,
        activation=SwiGLU(alpha=1.702, up_offset=1.0),
        size="only_size",
    ),
    Family(
        "llama4",
        ("llama4", "llama4_text"),
        refusal="weighs the input of an expert, where this layer weighs its activations",
    ),
)

_MAX_LAYERS = 10_000
MAX_TEXT = 80  # of a value in a message, in characters

# What is asked of a configuration, and the words that families have for it.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers",),
    "num_experts": ("n_routed_experts", "num_experts", "num_local_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "experts_per_token"),
    # Kimi-K3's experts are narrower than the model.
    "hidden_size": ("routed_expert_hidden_size", "hidden_size"),
    "model_size": ("hidden_size",),  # of router and shared experts
    "vocabulary": ("vocab_size",),
    "scoring": ("scoring_func", "moe_router_activation_func"),
    "renormalize": ("norm_topk_prob", "moe_renormalize", "route_norm"),
    "num_groups": ("n_group", "num_expert_group"),
    "top_groups": ("topk_group",),
    "scaling_factor": ("routed_scaling_factor", "router_scaling_factor"),
    "clamp": ("swiglu_limit",),
    "alpha": ("swiglu_alpha",),
    "num_dense_layers": ("first_k_dense_replace",),
    "num_mtp_layers": ("num_nextn_predict_layers", "num_mtp_layers"),  # of multi-token prediction, after the last
    "num_hash_layers": ("num_hash_layers", "n_hash_layers"),
    "num_shared_experts": ("n_shared_experts", "num_shared_experts"),
    "shared_size": ("shared_expert_intermediate_size",),  # of all shared experts
    "size": ("moe_intermediate_size",),  # of an expert
    "only_size": ("intermediate_size",),  # likewise, of models without dense layers, which is theirs in others
    "uses_sigmoid": ("moe_router_use_sigmoid",),
    "has_bias": ("use_routing_bias", "moe_router_enable_expert_bias"),
    "activation": ("hidden_act",),
    "situ_beta": ("activation_situ_beta",),
    "situ_linear_beta": ("activation_situ_linear_beta",),
}
# By any of them a configuration says which layers have no experts.
_DENSE_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "mlp_layer_types": list,
    "moe_layer_freq": (int, list),
    "first_k_dense_replace": int,
    "decoder_sparse_step": int,
    "mlp_only_layers": list,
}


class Config:
    """config.json of a model, with the words of its family; that of the text where there is one for images, too."""

    def __init__(self, fields: Mapping[str, Any], file: str) -> None:
        self.file = file
        text = fields.get("text_config")
        self.fields: Mapping[str, Any] = {**fields, **text} if isinstance(text, Mapping) else fields
        # In this order: a text's own type says more, but families list that of the whole first.
        types = (fields.get("model_type"), self.fields.get("model_type"))
        self.model_types = tuple(dict.fromkeys(name for name in types if isinstance(name, str)))

    def get(self, what: str, kind: type | tuple[type, ...]) -> Any:
        """The value by a key of `_KEYS`, None if there is none. Raises `CheckpointError` for one of another kind."""
        for key in _KEYS[what]:
            if (value := self.fields.get(key)) is not None:
                if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                    raise self.error(f"has {key} = {text_of(value, MAX_TEXT)}: look what it should be.")
                return value
        return None

    def stated(self, what: str) -> int | None:
        """A number that may be 0, None where there is none. Raises `CheckpointError` for one that no size can be."""
        value = self.get(what, int)
        if value is not None and not 0 <= value < 1 << 31:
            raise self.error(
                f"has {self.key(what)} = {text_of(value, MAX_TEXT)}, wanted a number from 0 to below 2**31: take it "
                "from its source."
            )
        return None if value is None else int(value)

    def key(self, what: str) -> str:
        """The key by which `get` finds a value, the first one that it looks for if there is none."""
        return next((key for key in _KEYS[what] if self.fields.get(key) is not None), _KEYS[what][0])

    def count(self, what: str, default: int | None = None) -> int:
        """A positive number. Raises `CheckpointError` where there is none."""
        value = self.get(what, int)
        value = default if value is None else value
        if value is None or not 0 < value < 1 << 31:
            raise self.error(
                f"has {self.key(what)} = {text_of(value, MAX_TEXT)}, wanted a positive number below 2**31: take it "
                "from its source."
            )
        return int(value)

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(self.file, None, problem)

    def is_hashed(self, layer: int) -> bool | None:
        """Whether a layer should choose experts by a table; None if the configuration does not say."""
        kinds = self.fields.get("mlp_layer_types")
        if isinstance(kinds, list) and layer < len(kinds):
            return bool(kinds[layer] == "hash_moe")
        number = self.get("num_hash_layers", int)
        return None if number is None else bool(layer < number)

    def says_which_are_dense(self) -> bool:
        return any(self.fields.get(key) is not None for key in _DENSE_KEYS)

    def moe_layers(self) -> list[int]:
        """Which layers should have experts."""
        num_layers = self.count("num_layers")
        if num_layers > _MAX_LAYERS:
            raise self.error(f"has {num_layers} layers, wanted at most {_MAX_LAYERS}: take it from its source.")
        kinds, frequency = self.fields.get("mlp_layer_types"), self.fields.get("moe_layer_freq")
        for key, kind in _DENSE_KEYS.items():
            value = self.fields.get(key)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise self.error(f"has {key} = {text_of(value, MAX_TEXT)}: look what it should be.")
        for key, values in (("mlp_layer_types", kinds), ("moe_layer_freq", frequency)):
            if isinstance(values, list) and len(values) < num_layers:
                raise self.error(
                    f"has {key} of {len(values)} layers, wanted all {num_layers}: take it from its source."
                )
        if isinstance(kinds, list):
            return [layer for layer, kind in enumerate(kinds[:num_layers]) if kind != "dense"]
        if isinstance(frequency, list):
            return [layer for layer, is_moe in enumerate(frequency[:num_layers]) if is_moe]
        first = max(self.get("num_dense_layers", int) or 0, 0)
        step = frequency if isinstance(frequency, int) and frequency > 0 else 1
        layers: Iterable[int] = (layer for layer in range(first, num_layers) if layer % step == 0)
        # Qwen's words.
        sparse_step, dense = self.fields.get("decoder_sparse_step"), self.fields.get("mlp_only_layers")
        if isinstance(sparse_step, int) and sparse_step > 0:
            layers = (layer for layer in layers if (layer + 1) % sparse_step == 0)
        left_out = {layer for layer in dense if isinstance(layer, int | float)} if isinstance(dense, list) else set()
        return [layer for layer in layers if layer not in left_out]


def families_of(config: Config) -> list[Family]:
    """The rows for a model. Raises `CheckpointError` for models of no family here, and for what cannot be served."""
    for model_type in config.model_types:
        rows = [family for family in FAMILIES if model_type in family.model_types]
        if rows and rows[0].refusal is not None:
            raise config.error(
                f"has model_type {text_of(model_type, MAX_TEXT)}, which {rows[0].refusal}: "
                "this version cannot serve it, use another one."
            )
        if rows:
            return rows
    found = " or ".join(text_of(name, MAX_TEXT) for name in config.model_types) or None
    known = sorted({name for family in FAMILIES if family.refusal is None for name in family.model_types})
    raise config.error(
        f"has model_type {found}, wanted one of {', '.join(known)}: "
        "where only the name is new, change it in a copy of config.json; see docs/checkpoints.md for new families."
    )
