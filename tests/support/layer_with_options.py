"""The layer with all its options, and what one call of it takes where ranks share its experts, for GPU tests."""

import functools
from typing import Any

import jax

import jax_megamoe as mm
from tests.support.cases import SHARED
from tests.support.problems import Problem
from tests.support.problems import make_problem as make_problem_of

OPTIONS: dict[str, Any] = {"activation_clamp": 6.0, "routed_scaling_factor": 1.5, "return_expert_load": True}

moe: Any = jax.jit(functools.partial(mm.moe, **OPTIONS))
reference: Any = jax.jit(functools.partial(mm.reference.moe, **OPTIONS))


def make_problem(num_tokens: int, routing: str = "uniform", seed: int = 0) -> Problem:
    """Of all ranks, with the same weights for every seed."""
    return make_problem_of(num_tokens, SHARED, routing, seed)
