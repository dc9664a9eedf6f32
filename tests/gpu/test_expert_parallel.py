"""The fused kernel over the ranks of an expert axis: `python -m pytest -m gpu tests/gpu/test_expert_parallel.py`.

Wanted is what one of the GPUs makes of all tokens by itself. The two files of sharding tests have the ways to shard a program, on
GPUs too; here are the sizes, loads and orders of calls that a group of GPUs has to stand.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.primitives import _library
from tests.gpu import process_worker
from tests.support import processes
from tests.support.cases import GATHERED, HALVES, ODD_ROUTINGS, OTHER_FORMATS, SHARED, all_ranks
from tests.support.compare import bits, difference
from tests.support.hlo import is_fused, opcodes_of_large_results, types_of_collectives
from tests.support.layer_with_options import OPTIONS, make_problem, moe, reference
from tests.support.meshes import AUTO, EXPLICIT, gpu_mesh, place, place_all
from tests.support.problems import Problem, make_weights
from tests.support.problems import make_problem as make_problem_of
from tests.support.skips import gpu_tests, why_no_gpus, why_no_group

E, H = SHARED.num_experts, SHARED.hidden
pytestmark = gpu_tests(why_no_group())


def token_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in ("data", "expert") if axis in mesh.shape)


def is_fused_for(function: Any, *arguments: Any) -> bool:
    return is_fused(function.lower(*arguments).compile())


def assert_as_on_one_gpu(result: Any, problem: Problem) -> None:
    """The result is that of the reference, and has the bits that one GPU gives all tokens."""
    y, load = result
    wanted, wanted_load = reference(*problem)
    assert y.dtype == jnp.bfloat16 and np.isfinite(np.asarray(y, np.float32)).all()
    np.testing.assert_array_equal(load, wanted_load)
    assert difference(y, wanted) < 1e-4
    alone, load_alone = moe(*problem)
    np.testing.assert_array_equal(load_alone, wanted_load)
    np.testing.assert_array_equal(bits(y), bits(alone))  # in the same orientation: see cases.SHARED


@all_ranks
@pytest.mark.parametrize("tokens", [1, 3, 8, 40, 128, 200, 1000])
def test_token_counts(num_ranks, tokens):
    mesh, problem = gpu_mesh(expert=num_ranks), make_problem(tokens * num_ranks)
    arguments = place_all(mesh, problem)
    assert is_fused_for(moe, *arguments)
    assert_as_on_one_gpu(moe(*arguments), problem)


@all_ranks
@pytest.mark.parametrize("routing", ODD_ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 8, 40, 200, 1000])
def test_routings(num_ranks, tokens, routing):
    mesh, problem = gpu_mesh(expert=num_ranks), make_problem(tokens * num_ranks, routing)
    y, load = moe(*place_all(mesh, problem))
    assert_as_on_one_gpu((y, load), problem)
    if routing == "none":
        assert not np.asarray(y, np.float32).any()


@all_ranks
def test_all_tokens_to_one_rank(num_ranks):
    """And none from the others: each rank in turn has tokens with used slots, all for the experts of the next one."""
    mesh, tokens = gpu_mesh(expert=num_ranks), 8
    x, weights, ids, topk_weights = make_problem(tokens * num_ranks)
    for source in range(num_ranks):
        first = (source + 1) % num_ranks * (E // num_ranks)
        used = jnp.repeat(jnp.arange(num_ranks) == source, tokens)[:, None]
        problem = Problem(x, weights, jnp.where(used, first + ids % (E // num_ranks), -1), topk_weights)
        assert_as_on_one_gpu(moe(*place_all(mesh, problem)), problem)


@all_ranks
@pytest.mark.parametrize("weight_format", ["fp8_block", *OTHER_FORMATS])
@pytest.mark.parametrize("tokens", [3, 300])
def test_odd_sizes(num_ranks, tokens, weight_format):
    mesh, sizes = gpu_mesh(expert=num_ranks), SHARED._replace(hidden=480, inter=352)
    problem = make_problem_of(tokens * num_ranks, sizes, "masked", weight_format=weight_format)
    arguments = place_all(mesh, problem)
    assert is_fused_for(moe, *arguments)
    assert_as_on_one_gpu(moe(*arguments), problem)


@all_ranks
@pytest.mark.parametrize("weight_format", OTHER_FORMATS)
@pytest.mark.parametrize("tokens", [1, 8, 40, 128, 200, 1000])
def test_formats_of_weights(num_ranks, tokens, weight_format):
    mesh = gpu_mesh(expert=num_ranks)
    problem = make_problem_of(tokens * num_ranks, SHARED, "masked", weight_format=weight_format)
    arguments = place_all(mesh, problem)
    assert is_fused_for(moe, *arguments)
    assert_as_on_one_gpu(moe(*arguments), problem)


@all_ranks
@pytest.mark.parametrize("routing", ["uniform", *ODD_ROUTINGS])
@pytest.mark.parametrize("tokens", [4, 11, 32, 120])
def test_in_halves(num_ranks, tokens, routing):
    """With two CTAs on each SM: few tokens of weights that are decoded."""
    mesh, sizes = gpu_mesh(expert=num_ranks), HALVES._replace(num_experts=HALVES.num_experts * num_ranks)
    problem = make_problem_of(tokens * num_ranks, sizes, routing, weight_format="mxfp4")
    arguments = place_all(mesh, problem)
    assert is_fused_for(moe, *arguments)
    for _ in range(3):
        assert_as_on_one_gpu(moe(*arguments), problem)


@all_ranks
@pytest.mark.parametrize("tokens", [1, 8, 40, 200, 1000])
def test_shared_experts(num_ranks, tokens):
    """Equal bits: a rank's shared experts are its own, and the order of a token's slots is the same."""
    mesh = gpu_mesh(expert=num_ranks)
    problem = make_problem(tokens * num_ranks, "masked")
    shared = make_weights(SHARED._replace(num_experts=2), seed=9)
    scale = np.random.default_rng(tokens).random((tokens * num_ranks, 2), np.float32)
    arguments = place_all(mesh, problem)
    placed = {"shared": place(mesh, shared), "shared_weights": place(mesh, scale, "expert")}
    assert is_fused(moe.lower(*arguments, **placed).compile())
    y, load = moe(*arguments, **placed)
    wanted, wanted_load = moe(*problem, shared=shared, shared_weights=scale)
    np.testing.assert_array_equal(load, wanted_load)
    np.testing.assert_array_equal(bits(y), bits(wanted))


SIZES: dict[str, dict[str, int]] = {
    "data x expert": {"data": 2, "expert": 2},
    "expert x data": {"expert": 2, "data": 2},
    "expert x model": {"expert": 2, "model": 2},
    "data x expert of 8": {"data": 2, "expert": 4},
    "expert x model of 8": {"expert": 4, "model": 2},
    "three axes": {"data": 2, "expert": 2, "model": 2},
}


@pytest.mark.parametrize("way", ["auto", "explicit", "manual", "manual without marks"])
@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "reversed"])
@pytest.mark.parametrize("sizes", [{"expert": 2}, *SIZES.values()], ids=["expert", *SIZES])
def test_ways_to_shard(sizes, reverse, way):
    mesh = gpu_mesh(EXPLICIT if way == "explicit" else AUTO, reverse, **sizes)
    problem = make_problem(32, "masked")
    arguments = place_all(mesh, problem)
    function = moe
    if way.startswith("manual"):
        tokens = P(token_axes(mesh))
        function = jax.jit(
            jax.shard_map(
                functools.partial(mm.moe, **OPTIONS),
                mesh=mesh,
                in_specs=(tokens, P("expert"), tokens, tokens),
                out_specs=(tokens, P("expert")),
                check_vma=way == "manual",
            )
        )
    assert is_fused_for(function, *arguments)
    assert_as_on_one_gpu(function(*arguments), problem)


def test_expert_axis_of_two_mesh_axes():
    mesh, problem = gpu_mesh(a=2, b=2), make_problem(32)
    x, ids, topk_weights = (place(mesh, problem[i], ("a", "b")) for i in (0, 2, 3))
    function = jax.jit(functools.partial(mm.moe, expert_axis=("b", "a"), token_axes=("a", "b"), **OPTIONS))
    arguments = x, place(mesh, problem[1], ("b", "a")), ids, topk_weights
    assert is_fused_for(function, *arguments)
    assert_as_on_one_gpu(function(*arguments), problem)


@all_ranks
@pytest.mark.parametrize("tokens", [1, 5])
def test_padding(num_ranks, tokens):
    mesh, problem = gpu_mesh(expert=num_ranks), make_problem(tokens)
    weights = place(mesh, problem[1], "expert")
    assert_as_on_one_gpu(moe(problem[0], weights, *problem[2:]), problem)


@all_ranks
def test_no_tokens(num_ranks):
    mesh = gpu_mesh(expert=num_ranks)
    y, load = moe(*place_all(mesh, make_problem(0)))
    assert y.shape == (0, H) and not np.asarray(load).any()


@all_ranks
@pytest.mark.parametrize("tokens", [2, 128, 1000])
def test_repeated_launches_give_the_same_bits(num_ranks, tokens):
    mesh, problem = gpu_mesh(expert=num_ranks), make_problem(tokens * num_ranks)
    arguments = place_all(mesh, problem)
    first = bits(moe(*arguments)[0])
    # Enqueued one behind the other, so that ranks are in different launches at a time.
    for y, _ in [moe(*arguments) for _ in range(200)]:
        np.testing.assert_array_equal(bits(y), first)


@all_ranks
def test_ten_thousand_launches(num_ranks):
    """With another routing in each of a program's launches, skewed and empty ones among them, and every bit compared."""
    mesh, tokens, turns = gpu_mesh(expert=num_ranks), 5 * num_ranks, 100
    routings = ("uniform", "masked", "one", "none", "uniform")
    problems = [make_problem(tokens, routings[seed % len(routings)], seed) for seed in range(turns)]
    weights = problems[0][1]
    x, ids, topk_weights = (
        jnp.stack([getattr(problem, name) for problem in problems]) for name in ("x", "ids", "topk_weights")
    )
    spec = (None, "expert")
    placed = (*(place(mesh, value, *spec) for value in (x, ids, topk_weights)), place(mesh, weights, "expert"))

    @jax.jit
    def run(x, ids, topk_weights, weights):
        return jax.lax.map(lambda call: moe(call[0], weights, call[1], call[2])[0], (x, ids, topk_weights))

    wanted = place(mesh, bits(run(x, ids, topk_weights, weights)), *spec)
    count_wrong = jax.jit(lambda y: (jax.lax.bitcast_convert_type(y, jnp.uint16) != wanted).sum())
    wrong = [count_wrong(run(*placed)) for _ in range(10_000 // turns)]
    assert sum(map(int, wrong)) == 0


@all_ranks
def test_two_programs_that_take_turns(num_ranks):
    """Of different shapes, so that one may share the other's memory or have its own."""
    mesh = gpu_mesh(expert=num_ranks)
    problems = [make_problem(tokens * num_ranks, "masked", seed) for seed, tokens in enumerate((4, 100))]
    arguments = [place_all(mesh, problem) for problem in problems]
    wanted = [bits(moe(*a)[0]) for a in arguments]
    for problem, a in zip(problems, arguments, strict=True):
        assert_as_on_one_gpu(moe(*a), problem)
    results = [moe(*arguments[turn % 2])[0] for turn in range(100)]
    for turn, y in enumerate(results):
        np.testing.assert_array_equal(bits(y), wanted[turn % 2])


@all_ranks
@pytest.mark.parametrize("tokens", [2, 100])
@pytest.mark.parametrize("captured", [False, True], ids=["default", "captured"])
def test_stacked_layers_in_a_scan(num_ranks, tokens, captured):
    mesh = gpu_mesh(expert=num_ranks)
    layers = [make_weights(SHARED, seed) for seed in range(3)]
    problem = make_problem(tokens * num_ranks)
    x, _, ids, topk_weights = place_all(mesh, problem)
    arguments = x, place(mesh, mm.stack_experts(layers), None, "expert"), ids, topk_weights

    def run(x: Any, stacked: Any, ids: Any, topk_weights: Any) -> Any:
        step: Any = functools.partial(mm.moe, **OPTIONS)
        return jax.lax.scan(lambda c, i: (c, step(x, stacked, ids, topk_weights, layer=i)), 0, jnp.arange(3))[1]

    options = {"xla_gpu_graph_min_graph_size": 1} if captured else None
    compiled = jax.jit(run, compiler_options=options).lower(*arguments).compile()
    text = str(compiled.as_text())
    assert _library.MOE_PEERS_TARGET in text
    # The smaller FP8 leaf of one rank, one layer: nothing of that size is copied, sliced or gathered.
    found = opcodes_of_large_results(text, layers[0].down.size // num_ranks)
    assert not any(word in opcode for opcode in found for word in ("gather", "copy", "slice", "fusion")), found
    for _ in range(3):
        ys, loads = compiled(*arguments)
        for y, load, weights in zip(ys, loads, layers, strict=True):
            assert_as_on_one_gpu((y, load), problem._replace(weights=weights))


@all_ranks
def test_sliced_operands(num_ranks):
    """XLA reads slices of tokens and of stacked weights in place, by a call that takes the place of the first one."""
    mesh = gpu_mesh(expert=num_ranks)
    x, _, ids, topk_weights = make_problem(4 * num_ranks)
    layers = [make_weights(SHARED, seed) for seed in range(2)]
    stacked = place(mesh, mm.stack_experts(layers), None, "expert")
    batches = [place(mesh, jnp.stack([value, value[::-1]]), None, "expert") for value in (x, ids, topk_weights)]

    def run(x: Any, stacked: Any, ids: Any, topk_weights: Any) -> Any:
        pick = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(2)]
        return [moe(x[b], pick[b], ids[b], topk_weights[b]) for b in range(2)]

    compiled = jax.jit(run).lower(batches[0], stacked, *batches[1:]).compile()
    assert str(compiled.as_text()).count(f'custom_call_target="{_library.MOE_PEERS_TARGET}"') == 2
    for result, weights, order in zip(compiled(batches[0], stacked, *batches[1:]), layers, (1, -1), strict=True):
        assert_as_on_one_gpu(result, Problem(x[::order], weights, ids[::order], topk_weights[::order]))


@all_ranks
def test_many_layers_in_one_program(num_ranks):
    """Each takes the result of the one before: what a decoder does, captured in a CUDA graph by default."""
    mesh, problem = gpu_mesh(expert=num_ranks), make_problem(4 * num_ranks)
    layers = [make_weights(SHARED, seed) for seed in range(3)] * 4

    @jax.jit
    def run(x: Any, layers: Any, ids: Any, topk_weights: Any) -> Any:
        for weights in layers:
            x = jnp.clip(mm.moe(x, weights, ids, topk_weights), -1, 1)  # layer by layer values would grow without bound
        return x

    x, _, ids, topk_weights = place_all(mesh, problem)
    placed = [place(mesh, weights, "expert") for weights in layers]
    wanted = bits(run(problem[0], layers, *problem[2:]))
    for _ in range(20):
        np.testing.assert_array_equal(bits(run(x, placed, ids, topk_weights)), wanted)


@all_ranks
def test_vmap(num_ranks):
    mesh, problem = gpu_mesh(expert=num_ranks), make_problem(8 * num_ranks)
    weights = place(mesh, problem[1], "expert")
    tokens = (value.reshape(2, 4 * num_ranks, -1) for value in (problem.x, problem.ids, problem.topk_weights))
    x, ids, topk_weights = (place(mesh, value, None, "expert") for value in tokens)
    y, load = jax.jit(jax.vmap(functools.partial(mm.moe, **OPTIONS), in_axes=(0, None, 0, 0)))(
        x, weights, ids, topk_weights
    )
    assert_as_on_one_gpu((y.reshape(-1, H), load.sum(0)), problem)


@all_ranks
@pytest.mark.parametrize("tokens", [3, 128])
def test_implementations_agree(num_ranks, tokens):
    mesh, problem = gpu_mesh(expert=num_ranks), make_problem(tokens * num_ranks, "masked")
    arguments = place_all(mesh, problem)
    results = {}
    for implementation in (None, "cuda", "collective"):
        function = jax.jit(functools.partial(mm.moe, implementation=implementation, **OPTIONS))
        assert is_fused_for(function, *arguments) == (implementation != "collective")
        results[implementation] = function(*arguments)
    np.testing.assert_array_equal(bits(results[None][0]), bits(results["cuda"][0]))
    np.testing.assert_array_equal(results[None][1], results["collective"][1])
    # The same tiles, but each rank's sums are rounded to BF16.
    assert difference(results[None][0], results["collective"][0]) < 1e-5


@all_ranks
@pytest.mark.parametrize("tokens", [3, 128])
def test_collectives_are_near_one_gpu(num_ranks, tokens):
    """Not its bits: each rank's sums are rounded to BF16 before they travel."""
    mesh, problem = gpu_mesh(expert=num_ranks), make_problem(tokens * num_ranks, "masked")
    alone, load_alone = moe(*problem)
    function = jax.jit(functools.partial(mm.moe, implementation="collective", **OPTIONS))
    arguments = place_all(mesh, problem)
    y, load = function(*arguments)
    np.testing.assert_array_equal(load, load_alone)
    assert difference(y, alone) < 1e-5
    (sums,) = types_of_collectives(function.lower(*arguments).as_text())["all_to_all"]
    assert sums.endswith("xui16")


@all_ranks
@pytest.mark.parametrize("weight_format", ["fp8_block", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 40, 200, 1000])
def test_batch_invariant(num_ranks, tokens, weight_format):
    """The bits of one GPU in whatever way: with other orientations by rule, by collectives, and by XLA's all-reduce."""
    mesh = gpu_mesh(expert=num_ranks)
    problem = make_problem_of(tokens * num_ranks, GATHERED, "masked", weight_format=weight_format)
    wanted = bits(jax.jit(functools.partial(mm.moe, batch_invariant=True))(*problem))
    arguments = place_all(mesh, problem)
    for implementation in ("cuda", "collective"):
        function = jax.jit(functools.partial(mm.moe, batch_invariant=True, implementation=implementation))
        assert is_fused_for(function, *arguments) == (implementation == "cuda")
        np.testing.assert_array_equal(bits(function(*arguments)), wanted)
    # All ranks have all tokens.
    specs = (P(), P("expert"), P(), P())
    mapped = jax.shard_map(
        functools.partial(mm.moe, batch_invariant=True, implementation="collective"),
        mesh=mesh,
        in_specs=specs,
        out_specs=P(),
    )
    np.testing.assert_array_equal(bits(jax.jit(mapped)(*place_all(mesh, problem, tokens=None))), wanted)


def test_layers_share_one_buffer():
    mesh = gpu_mesh(expert=2)
    jax.clear_caches()
    functions = [jax.jit(functools.partial(mm.moe, routed_scaling_factor=factor)) for factor in (1.0, 2.0, 3.0)]
    for function in functions:
        function(*place_all(mesh, make_problem(32)))
    assert len(_library.symmetric_memories()) == 2  # one on each device


def saved(folder: Path, call: str, what: str, num_ranks: int) -> np.ndarray[Any, Any]:
    """What the processes of process_worker.py have saved of a call, one part after the other."""
    return np.concatenate([np.load(folder / f"{call}.{process}.{what}.npy") for process in range(num_ranks)])


@all_ranks
def test_one_process_per_gpu(num_ranks, tmp_path):
    if reason := why_no_gpus(num_ranks):
        pytest.skip(reason)
    processes.check_ended(processes.run(process_worker.__name__, str(tmp_path), processes=num_ranks, limit=240))
    for tokens in process_worker.TOKENS:
        problem = make_problem(tokens * num_ranks, "masked")
        alone, load = moe(*problem)
        for turn in range(20):
            np.testing.assert_array_equal(saved(tmp_path, f"{tokens}.{turn}", "load", num_ranks), load)
            np.testing.assert_array_equal(saved(tmp_path, f"{tokens}.{turn}", "y", num_ranks), bits(alone))


def test_processes_with_ipc_namespaces_of_their_own(tmp_path):
    """As in two containers: they cannot map each other's memory, and collectives serve them."""
    if reason := why_no_gpus(2):
        pytest.skip(reason)
    allowed = [sys.executable, "-c", f"import os; os.unshare({os.CLONE_NEWIPC})"]
    if subprocess.run(allowed, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to make an IPC namespace")
    arguments = (str(tmp_path), process_worker.OWN_IPC)
    processes.check_ended(processes.run(process_worker.__name__, *arguments, processes=2, limit=240))
    for tokens in process_worker.TOKENS:
        alone, load = moe(*make_problem(tokens * 2, "masked"))
        for turn in range(20):
            np.testing.assert_array_equal(saved(tmp_path, f"{tokens}.{turn}", "load", 2), load)
            y = saved(tmp_path, f"{tokens}.{turn}", "y", 2).view(ml_dtypes.bfloat16)
            assert difference(y, alone) < 1e-4
