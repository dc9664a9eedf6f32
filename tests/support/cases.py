"""Cases that several tests take, with their ids, and which of many CI runs."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pytest

from jax_megamoe.weight_layout import Format
from tests.support.problems import Sizes

# A small layer whose experts two, four or eight ranks share. It has fewer gate/up units than a GPU has SMs, as each of the
# ranks does, so that all of them take the same orientation of the tiles for as many tokens an expert.
SHARED = Sizes(hidden=512, inter=384, num_experts=16, top_k=4)

# One whose gate/up units are more than a GPU has SMs, and fewer on each of the ranks: they take the same orientation only where
# calls are batch-invariant. Few tokens are gathered row by row there.
GATHERED = Sizes(hidden=512, inter=2048, num_experts=16, top_k=4)

# One that has two CTAs on each SM with 4 to 120 tokens, if its weights are MXFP4. Both numbers of K blocks are odd.
HALVES = Sizes(hidden=640, inter=1408, num_experts=16, top_k=4)

# Hidden and intermediate sizes.
MODELS = {
    "flash": (4096, 2048),
    "pro": (7168, 3072),
    "deepseek-v3": (7168, 2048),
    "qwen3-30b": (2048, 768),
    "glm-5": (6144, 2048),
    "odd tiles": (4096, 1408),
    "smallest": (128, 128),
    "wide inside": (256, 384),
    # As many down units as a warp has lanes, and more, in either orientation.
    "hidden 8192": (8192, 128),
    "hidden 4096": (4096, 128),
}
LARGEST_MODELS = {name: MODELS[name] for name in ("flash", "pro")}

# What a list of ids may do to the experts, beside what `make_inputs` draws by itself.
ODD_ROUTINGS = ["one", "masked", "none"]

# Formats of weights, without the one that all other tests have.
OTHER_FORMATS = [name for name in get_args(Format) if name != "fp8_block"]

all_ranks = pytest.mark.parametrize("num_ranks", [2, 4, 8])


def exhaustive(*values: Any, id: str | None = None) -> Any:
    """A case that is one more combination of what other cases have apart."""
    return pytest.param(*values, id=id, marks=pytest.mark.exhaustive)


def one_in(number: int, *choices: Mapping[str, Any] | Sequence[Any], first: int = 0) -> list[Any]:
    """All combinations, of which about one in `number` runs always, as squares of one colour: others are `exhaustive`.

    Each value is in one that runs, and of three choices any two values if `number` is two. The first choice varies
    slowest. Names of a mapping become the cases' ids. `first` is the colour: tests of the same choices take different ones.
    """
    named = [list(each.items() if isinstance(each, Mapping) else ((str(v), v) for v in each)) for each in choices]
    cases, kept = [], set()
    for places in itertools.product(*(range(len(each)) for each in named)):
        chosen = [each[place] for each, place in zip(named, places, strict=True)]
        runs = sum(places) % number == first
        kept |= set(enumerate(places)) if runs else set()
        case = pytest.param if runs else exhaustive
        cases.append(case(*(value for _, value in chosen), id="-".join(name for name, _ in chosen)))
    assert len(kept) == sum(map(len, named)), "a value has no case that runs always"
    return cases
