"""What the log says of placements that cost more than they have to, and that it says nothing of the others."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe import placement_log
from tests.support.expert_layer import make_layer, packed_weights
from tests.support.meshes import AUTO, EXPLICIT, make_mesh, place, place_all

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 host devices")

DP_EP = {"dp": 2, "ep": 4}
DATA_EXPERT = {"data": 2, "expert": 4}
FSDP = {"data": 1, "fsdp": 4, "tensor": 1, "expert": 2}


def put(mesh: Mesh, tokens: Any = None, experts: Any = None, num_tokens: int = 16) -> tuple[Any, ...]:
    return place_all(mesh, make_layer(num_tokens), tokens, experts)


@pytest.fixture
def logged(caplog) -> Callable[..., list[str]]:
    """Traces or runs calls, twice, and returns what they logged."""

    def messages(function: Callable, *arguments: Any, run: bool = False) -> list[str]:
        placement_log._log_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "jax_megamoe"):
            for _ in range(2):
                function(*arguments) if run else jax.jit(lambda *a: function(*a)).trace(*arguments)
        assert all(record.name == "jax_megamoe" and record.levelname == "WARNING" for record in caplog.records)
        return [record.getMessage() for record in caplog.records]

    return messages


@pytest.mark.parametrize(
    "sizes, tokens, experts, axes, words",
    [
        (DP_EP, ("dp", "ep"), "ep", {}, ["(dp: 2, ep: 4)", "pass the axis that splits the experts", "('dp', 'ep')"]),
        (DP_EP, ("dp", "ep"), "ep", {"expert_axis": "ep"}, ["not split over 'dp', 'ep'", "token_axes=('dp', 'ep')"]),
        (DP_EP, "dp", "ep", {"expert_axis": "ep", "token_axes": ()}, ["not split over 'dp',", "token_axes=('dp',)"]),
        (FSDP, ("data", "fsdp"), "expert", {}, ["not split over 'fsdp',", "token_axes=('data', 'fsdp', 'expert')"]),
        ({"data": 8}, "data", None, {}, ["expert_axis=None where each device has all"]),
    ],
    ids=str,
)
def test_log_of_automatic_axes(logged, sizes, tokens, experts, axes, words):
    arguments = put(make_mesh(sizes, AUTO), tokens, experts)
    (message,) = logged(functools.partial(mm.moe, **axes), *arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "sizes, experts, axes, words",
    [
        (DP_EP, "ep", {"token_axes": ("dp", "ep")}, ["weights.gate_up is split over 'ep'", "pass expert_axis='ep'"]),
        (DATA_EXPERT, "data", {}, ["split over 'data'", "dimension 0 split over 'expert'"]),
        (
            DATA_EXPERT,
            "expert",
            {"expert_axis": None},
            ["pass expert_axis='expert', or place them once, whole on each"],
        ),
    ],
    ids=str,
)
def test_log_of_weights_that_are_seen_to_move(logged, sizes, experts, axes, words):
    mesh = make_mesh(sizes, AUTO)
    weights, layer = place(mesh, packed_weights(), experts), make_layer(8)
    function = lambda x: mm.moe(x, weights, layer.ids, layer.topk_weights, **axes)  # noqa: E731
    (message,) = logged(function, place(mesh, layer.x, tuple(sizes)))
    assert all(word in message for word in words), message


def test_log_of_tokens_that_are_seen_to_be_gathered(logged):
    arguments = put(make_mesh({"data": 2, "model": 4}, AUTO), ("data", "model"), "model", num_tokens=8)
    function = functools.partial(mm.moe, expert_axis="model", token_axes="data")
    (message,) = logged(function, *arguments, run=True)
    assert "not split over 'model'" in message and "token_axes=('data', 'model')" in message
    assert logged(function, *arguments) == []  # may be meant, and nothing is seen while tracing


def test_log_of_loads_without_marks(logged):
    mesh, tokens = make_mesh({"dp": 2, "expert": 4}, AUTO), P(("dp", "expert"))
    specs: Any = {"in_specs": (tokens, P("expert"), tokens, tokens), "out_specs": (tokens, P("expert"))}

    def mapped(**options: Any) -> Callable:
        f = functools.partial(mm.moe, return_expert_load=True, **options)
        return jax.shard_map(f, mesh=mesh, **specs, check_vma=False)

    arguments = put(mesh, ("dp", "expert"), "expert")
    (message,) = logged(mapped(), *arguments)
    assert "the expert load takes tokens along 'dp' for copies" in message
    assert logged(mapped(token_axes=("dp", "expert")), *arguments) == []


def test_log_of_experts_that_count_as_all_in_shard_map(logged):
    mesh, layer = make_mesh({"ep": 8}, AUTO), make_layer(8)
    function = lambda x, w, ids, topk_weights: mm.moe(x, dataclasses.replace(w, num_experts=1), ids, topk_weights)  # noqa: E731
    specs: Any = {"in_specs": P("ep"), "out_specs": P("ep")}
    for check_vma in (True, False):
        (message,) = logged(jax.shard_map(function, mesh=mesh, **specs, check_vma=check_vma), *layer[:4])
        assert "a device's experts count as all: pass the axis that splits the experts" in message


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("run", [False, True], ids=["traced", "run"])
def test_nothing_is_logged_for_what_is_placed_well(logged, kind, run):
    arguments = put(make_mesh(DATA_EXPERT, kind), ("data", "expert"), "expert", num_tokens=8)
    assert logged(mm.moe, *arguments, run=run) == []
    arguments = put(make_mesh(DP_EP, kind), ("dp", "ep"), "ep", num_tokens=8)
    function = functools.partial(mm.moe, expert_axis="ep", token_axes=("dp", "ep"))
    assert logged(function, *arguments, run=run) == []
    if not run:
        arguments = put(make_mesh({"data": 8}, kind), "data", num_tokens=8)
        assert logged(functools.partial(mm.moe, expert_axis=None), *arguments) == []
        assert logged(mm.moe, *put(make_mesh({"data": 1, "x": 1}, kind))) == []
        assert logged(mm.moe, *make_layer()[:4]) == []


def test_log_of_a_split_hidden_size(logged):
    mesh, layer = make_mesh(DATA_EXPERT, AUTO), make_layer(8)
    x = place(mesh, layer.x, None, "data")
    arguments = (x, *(place(mesh, value, None) for value in layer[1:4]))
    (message,) = logged(mm.moe, *arguments, run=True)
    assert "x is split over 'data' along its last dimension, the hidden size" in message


def test_each_line_that_calls_is_told_once(logged):
    arguments = put(make_mesh({"data": 8}, AUTO), "data")
    first, second = lambda *a: mm.moe(*a), lambda *a: mm.moe(*a)
    other_line = lambda *a: mm.moe(*a)  # noqa: E731

    def all_three(*a: Any) -> None:
        first(*a), second(*a), other_line(*a)

    assert len(logged(all_three, *arguments)) == 2


@pytest.mark.parametrize(
    ("tokens", "experts", "repeated"),
    [(None, None, "'data', 'expert'"), ("data", None, "'expert'"), (None, "expert", "'data'")],
    ids=str,
)
def test_log_of_work_that_explicit_types_repeat(logged, tokens, experts, repeated):
    arguments = put(make_mesh(DATA_EXPERT, EXPLICIT), tokens, experts, num_tokens=8)
    (message,) = logged(mm.moe, *arguments)
    assert f"x is the same along {repeated}, so that work is repeated" in message
    # Ranks with other experts may have the same tokens.
    assert logged(mm.moe, *put(make_mesh(DATA_EXPERT, EXPLICIT), "data", "expert", num_tokens=8)) == []


def test_log_of_work_that_shard_map_repeats(logged):
    mesh, layer = make_mesh(DATA_EXPERT, AUTO), make_layer(8)

    def mapped(tokens: P) -> Callable:
        return jax.shard_map(mm.moe, mesh=mesh, in_specs=(tokens, P("expert"), tokens, tokens), out_specs=tokens)

    (message,) = logged(mapped(P("expert")), *layer[:4])
    assert "x and the weights are the same along 'data', so that work is repeated" in message
    assert logged(mapped(P(("data", "expert"))), *layer[:4]) == []
