"""The router's kernel without a GPU: its sources compiled for the host, with a fiber for each of a CTA's threads."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_megamoe.primitives.route import SCORINGS
from tests.support.native_program import compile_program, cuda_include
from tests.support.routers import (
    all_routers,
    array_code,
    assert_alike,
    assert_as_array_code,
    assert_as_array_code_where_odd,
    params_of,
    ties,
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    flags: list[str | Path] = ["-isystem", cuda_include(), "-Wno-unknown-pragmas"]
    return compile_program(tmp_path_factory.mktemp("native"), "route_test", flags=flags)


def route_with(program: Any, top_k: int, options: dict[str, Any]) -> Any:
    """The kernel as a function of logits f32[T, E] and a bias f32[E] or None."""

    def route(logits: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        params, num_tokens = params_of(top_k, options), len(logits)
        sums_two = params.group_scoring == "sum_of_two"
        numbers = [num_tokens, logits.shape[1], top_k, SCORINGS.index(params.scoring), params.num_groups]
        numbers += [params.top_groups, int(sums_two), int(params.renormalize), int(bias is not None)]
        floats = [logits.ravel()] if bias is None else [logits.ravel(), bias]
        bits = np.concatenate(floats).astype(np.float32).view(np.uint32)
        found = np.array(program(" ".join(map(str, [*numbers, *bits])) + "\n").split(), np.int64)
        pairs = found.reshape(num_tokens, top_k, 2)
        return pairs[..., 0].astype(np.int32), pairs[..., 1].astype(np.uint32).view(np.float32)

    return route


@all_routers
def test_selects_and_weighs_as_array_code(program, num_experts, top_k, options):
    assert_as_array_code(route_with(program, top_k, options), num_experts, top_k, options, tokens=3)


@all_routers
def test_what_is_no_number(program, num_experts, top_k, options):
    assert_as_array_code_where_odd(route_with(program, top_k, options), num_experts, top_k, options, tokens=14)


@pytest.mark.parametrize("num_experts", [32, 256, 1000])
def test_of_equal_scores_the_lower_id_comes_first(program, num_experts):
    grouped: dict[str, Any] = {"scoring": "sigmoid", "num_groups": 4, "top_groups": 2}
    for options in ({}, grouped):
        logits = ties(num_experts)[:8]
        assert_alike(route_with(program, 8, options)(logits, None), array_code(jnp.asarray(logits), 8, options))
