"""What XLA for GPUs makes of programs that call `moe` over a mesh. It needs JAX's plugin for CUDA, but no GPU."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.primitives import _library
from tests.support import meshes
from tests.support.hlo import kernels, opcodes_of_large_results
from tests.support.meshes import mesh_of
from tests.support.skips import gpu_tests, why_no_cuda_plugin, why_no_kernel

pytestmark = gpu_tests(why_no_cuda_plugin() or why_no_kernel())

TOKENS, LAYERS = 8, 3
H, I, E, K = 512, 384, 16, 4
CALL = re.compile(f'custom_call_target="({_library.MOE_TARGET}|{_library.MOE_PEERS_TARGET})"')


def described_mesh(num_ranks: int) -> Mesh:
    config = (Path(__file__).parent / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=config, topology=f"1x1x{num_ranks}"
    )
    return mesh_of(topology.devices, {"expert": num_ranks})


def compiled_text(
    function: Callable[..., Any],
    num_ranks: int,
    weights_lead: tuple[int, ...] = (),
    tokens_lead: tuple[int, ...] = (),
    manual: bool = False,
) -> str:
    """The program for so many H100; stacks of weights and of tokens have leading dimensions that are not split.

    A `manual` one runs for each rank, and has a number of the rank's own as its last argument.
    """
    mesh = described_mesh(num_ranks)

    def split(leaf: Any, lead: tuple[int, ...] = ()) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, P(*(None for _ in lead), "expert"))
        return jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype, sharding=sharding)

    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((E, I, H), (E, I, H), (E, H, I))]
    weights = jax.tree.map(lambda leaf: split(leaf, weights_lead), jax.eval_shape(mm.quantize_experts, *floats))
    kinds = ((H, jnp.bfloat16), (K, jnp.int32), (K, jnp.float32))
    x, ids, topk_weights = (split(jax.ShapeDtypeStruct((TOKENS, n), dtype), tokens_lead) for n, dtype in kinds)
    arguments = [x, weights, ids, topk_weights]
    if manual:
        function = jax.shard_map(function, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
        arguments.append(split(jax.ShapeDtypeStruct((num_ranks,), jnp.int32)))
    return str(jax.jit(function).lower(*arguments).compile().as_text())


def where_called(text: str) -> list[str]:
    """The computation of each call, or ENTRY."""
    found, computation = [], ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = "ENTRY" if header[1] else header[2]
        if CALL.search(line):
            found.append(computation)
    return found


def layer_of(stacked: mm.ExpertWeights, layer: int) -> mm.ExpertWeights:
    return jax.tree.map(lambda leaf: leaf[layer], stacked)


def one_batch(x: Any, w: Any, ids: Any, topk_weights: Any) -> Any:
    return mm.moe(x[1], w, ids[1], topk_weights[1])


def scan_over_batches(x: Any, w: Any, ids: Any, topk_weights: Any) -> Any:
    return jax.lax.scan(lambda c, batch: (c, mm.moe(batch[0], w, *batch[1:])), 0, (x, ids, topk_weights))[1]


def layers_in_turn(x: Any, w: Any, ids: Any, topk_weights: Any) -> Any:
    for layer in range(LAYERS):
        x = mm.moe(x, layer_of(w, layer), ids, topk_weights)
    return x


def scan_over_weights(x: Any, w: Any, ids: Any, topk_weights: Any) -> Any:
    return jax.lax.scan(lambda carry, layer: (mm.moe(carry, layer, ids, topk_weights), None), x, w)[0]


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize(
    ("function", "weights_lead", "tokens_lead", "calls"),
    [
        (one_batch, (), (2,), 1),
        (scan_over_batches, (), (2,), 1),
        (layers_in_turn, (LAYERS,), (), LAYERS),
        (scan_over_weights, (LAYERS,), (), 1),
        (meshes.scan_over_layers, (LAYERS,), (), 1),
    ],
)
def test_slices_are_read_in_place_by_one_call(function, weights_lead, tokens_lead, calls, num_ranks):
    text = compiled_text(function, num_ranks, weights_lead, tokens_lead)
    target = _library.MOE_TARGET if num_ranks == 1 else _library.MOE_PEERS_TARGET
    assert CALL.findall(text) == [target] * calls
    # The smaller FP8 leaf of one rank, one layer.
    found = opcodes_of_large_results(text, E // num_ranks * H * I)
    assert "parameter" in found
    assert not any(word in opcode for opcode in found for word in ("copy", "fusion", "gather")), found


def used_in_one_branch(x: Any, w: Any, ids: Any, topk_weights: Any, own: Any) -> Any:
    y = mm.moe(x, w, ids, topk_weights)
    return jax.lax.cond(own[0] == 1, lambda: x, lambda: y)


def used_in_some_branches(x: Any, w: Any, ids: Any, topk_weights: Any, own: Any) -> Any:
    y = mm.moe(x, w, ids, topk_weights)
    return jax.lax.switch(own[0], [lambda: y * 3, lambda: y + 1, lambda: jnp.zeros_like(y)])


def used_in_a_loop(x: Any, w: Any, ids: Any, topk_weights: Any, own: Any) -> Any:
    y = mm.moe(x, w, ids, topk_weights)
    return jax.lax.fori_loop(0, own[0], lambda _, total: total + y, x)


@pytest.mark.parametrize("function", [used_in_one_branch, used_in_some_branches, used_in_a_loop])
def test_no_call_moves_to_where_a_rank_decides_alone(function):
    assert where_called(compiled_text(function, 2, manual=True)) == ["ENTRY"]


BIASED = {"scoring": "sigmoid", "bias": 0}
# Experts, top-k, arguments of which those that are arrays are only named, and the most kernels.
ROUTERS = {
    "Qwen3": (128, 8, {}, 5),
    "Kimi-K3": (896, 16, BIASED, 4),
    "DeepSeek-V2": (160, 6, {"renormalize": False, "num_groups": 8, "top_groups": 3, "group_scoring": "max"}, 6),
    "DeepSeek-V3": (256, 8, BIASED | {"num_groups": 8, "top_groups": 4}, 6),
    "DeepSeek-V3, kernel": (256, 8, BIASED | {"num_groups": 8, "top_groups": 4, "implementation": "cuda"}, 1),
    "DeepSeek-V4": (256, 6, BIASED | {"scoring": "sqrtsoftplus"}, 5),
    "DeepSeek-V4.1": (384, 6, BIASED | {"scoring": "sqrtsoftplus", "image_bias": 0, "is_image": 0}, 5),
    "hash": (256, 6, {"scoring": "sqrtsoftplus", "token_ids": 0, "hash_table": 0}, 3),
}


@pytest.mark.parametrize(("num_experts", "top_k", "options", "most"), ROUTERS.values(), ids=ROUTERS)
def test_the_router_is_few_kernels_and_a_map_of_experts_adds_none_to_array_code(num_experts, top_k, options, most):
    replicated = NamedSharding(described_mesh(1), P())

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    tokens, experts = 32, array((num_experts,), jnp.float32)
    known = {
        "bias": experts,
        "image_bias": experts,
        "is_image": array((tokens,), jnp.bool),
        "token_ids": array((tokens,), jnp.int32),
        "hash_table": array((1000, top_k), jnp.int32),
    }
    arrays = {name: known[name] for name in options if name in known}
    numbers = {"implementation": "reference"} | {name: v for name, v in options.items() if name not in known}

    def route(logits: Any, arrays: Any) -> Any:
        return mm.route(logits, top_k, **arrays, **numbers)

    def route_to_physical(logits: Any, arrays: Any, table: Any, counts: Any) -> Any:
        ids, topk_weights = route(logits, arrays)
        return mm.to_physical(ids, table, counts), topk_weights

    logits = array((tokens, num_experts), jnp.float32)
    table, counts = array((num_experts, 4), jnp.int32), array((num_experts,), jnp.int32)
    for function, arguments in ((route, ()), (route_to_physical, (table, counts))):
        text = str(jax.jit(function).lower(logits, arrays, *arguments).compile().as_text())
        allowed = most + (function is route_to_physical and numbers["implementation"] == "cuda")
        assert 1 <= len(kernels(text)) <= allowed, kernels(text)
