"""What is measured: the expert layers of public models on one GPU, and the kinds of routing.

One rank of an expert-parallel group of R ranks holds E / R experts. It is measured as M tokens over those experts
alone, which gives each expert the load that it has when every one of the R ranks contributes M tokens.
"""

from collections.abc import Iterable
from typing import NamedTuple, get_args

from bench.shape import Shape
from jax_megamoe.weight_layout import Format

GPU_BYTES = 78 * 2**30  # what an H100 offers


class Model(NamedTuple):
    """A model's routed experts, and where the figures come from."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    source: str

    def rank_of(self, num_ranks: int) -> Shape:
        """One rank of an expert-parallel group."""
        return Shape(self.hidden_size, self.intermediate_size, self.num_experts // num_ranks, self.top_k)


MODELS = {
    "flash": Model(4096, 2048, 256, 6, "DeepSeek-V4-Flash: configurations in MaxText and transformers"),
    "pro": Model(7168, 3072, 384, 6, "DeepSeek-V4-Pro: deepseek-ai/DeepGEMM#316"),
    "deepseek-v3": Model(7168, 2048, 256, 8, "DeepSeek-V3: configuration in MaxText"),
    "qwen3-30b": Model(2048, 768, 128, 8, "Qwen3-30B-A3B: configuration in MaxText"),
    "qwen3-235b": Model(4096, 1536, 128, 8, "Qwen3-235B-A22B: configuration in MaxText"),
    "glm-5": Model(6144, 2048, 256, 8, "GLM-5: configuration in transformers"),
    "kimi-k2": Model(7168, 2048, 384, 8, "Kimi-K2: configuration in MaxText"),
    "minimax-m2": Model(3072, 1536, 256, 8, "MiniMax-M2: configuration in transformers"),
}

# NAME is a rank of eight, as in older result files; NAME-ep1 the whole layer on one GPU, where it fits.
_EP8 = {name: model.rank_of(8) for name, model in MODELS.items()}
_EP1 = {f"{name}-ep1": model.rank_of(1) for name, model in MODELS.items() if model.rank_of(1).weight_bytes <= GPU_BYTES}
_TINY = {"tiny": Shape(256, 128, 8, 2)}  # for a dry run on a CPU
SHAPES = {**_EP8, **_EP1, **_TINY}
GROUPS = {"ep8": tuple(_EP8), "ep1": tuple(_EP1)}

# Bounds and shapes of what routers do: no skew, the skew of words in a text (popularity 1/rank), the most that one
# expert can get where a token's experts differ, and padding (slots that a serving system leaves unused).
ROUTINGS = {
    "uniform": "k different experts for each token, all equally likely",
    "zipf": "k different experts for each token, the r-th expert with a weight of 1/r",
    "hot": "expert 0 for every token, the other k - 1 as in uniform",
    "masked30": "uniform, then 30 % of all slots unused",
}

FORMATS: tuple[Format, ...] = get_args(Format)


def select_shapes(names: str) -> list[str]:
    """The shapes in a comma-separated list of shapes and groups; `ValueError` for others."""
    selected: list[str] = []
    for name in names.split(","):
        if name not in SHAPES and name not in GROUPS:
            raise ValueError(f"has {name!r}, wanted some of {', '.join(SHAPES)} or the groups {', '.join(GROUPS)}")
        selected += [shape for shape in GROUPS.get(name, (name,)) if shape not in selected]
    return selected


def select_routings(names: str) -> list[str]:
    """The kinds of routing in a comma-separated list, or all of them for `all`; `ValueError` for others."""
    return _select(names, ROUTINGS)


def select_formats(names: str) -> list[Format]:
    """The formats of weights in a comma-separated list, or all of them for `all`; `ValueError` for others."""
    return _select(names, FORMATS)


def _select[Name: str](names: str, known: Iterable[Name]) -> list[Name]:
    of_name = {str(name): name for name in known}
    selected = list(of_name) if names == "all" else list(dict.fromkeys(names.split(",")))
    unknown = [name for name in selected if name not in of_name]
    if unknown:
        raise ValueError(f"has {', '.join(map(repr, unknown))}, wanted some of {', '.join(of_name)}, or all")
    return [of_name[name] for name in selected]
