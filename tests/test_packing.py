"""Ways to make weights: part by part on each device, layer by layer, out of variables; and what memory that takes."""

import contextlib
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, DTypeError, LayoutError, ShapeError, ShardingError
from tests.support import boxes
from tests.support.cases import one_in
from tests.support.meshes import KINDS

E, H, I = 8, 256, 128


def make_floats(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape).astype(np.float32) / 16 for shape in ((E, I, H), (E, I, H), (E, H, I)))


def assert_same(a: Any, b: Any) -> None:
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left).view(np.uint8), np.asarray(right).view(np.uint8))


def make_mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((4,), ("expert",), axis_types=(kind,), devices=jax.devices("cpu")[:4])


@pytest.fixture(scope="module")
def weights() -> mm.ExpertWeights:
    return mm.quantize_experts(*make_floats())


@pytest.fixture(scope="module")
def tokens() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(1)
    ids, topk_weights = mm.route(jnp.asarray(rng.normal(size=(16, E)), jnp.float32), 2)
    return jnp.asarray(rng.normal(size=(16, H)), jnp.bfloat16), ids, topk_weights


@pytest.mark.parametrize(("kind", "check_vma"), one_in(2, KINDS, [True, False]))
def test_weights_made_on_each_device_serve_outside(weights, tokens, kind, check_vma):
    shard_map = functools.partial(
        jax.shard_map, mesh=make_mesh(kind), in_specs=P("expert"), out_specs=P("expert"), check_vma=check_vma
    )
    floats = jax.device_put(make_floats(), NamedSharding(make_mesh(kind), P("expert")))
    made = jax.jit(shard_map(functools.partial(mm.quantize_experts, num_experts=E)))(*floats)
    assert made.num_experts == E
    assert_same(made, weights)
    x, ids, topk_weights = tokens
    wanted = mm.moe(x, weights, ids, topk_weights)
    x, ids, topk_weights = jax.device_put((x, ids, topk_weights), NamedSharding(make_mesh(kind), P("expert")))
    np.testing.assert_array_equal(mm.moe(x, made, ids, topk_weights), wanted)
    repacked = jax.jit(shard_map(functools.partial(mm.pack_experts, num_experts=E)))(*made.unpack())
    assert repacked.num_experts == E
    assert_same(repacked, weights)


def test_weights_made_and_used_on_each_device(weights, tokens):
    def layer(gate: jax.Array, up: jax.Array, down: jax.Array, *tokens: jax.Array) -> jax.Array:
        x, ids, topk_weights = tokens
        return mm.moe(x, mm.quantize_experts(gate, up, down, num_experts=E), ids, topk_weights)

    mapped = jax.jit(jax.shard_map(layer, mesh=make_mesh(), in_specs=P("expert"), out_specs=P("expert")))
    x, ids, topk_weights = tokens
    np.testing.assert_array_equal(mapped(*make_floats(), *tokens), mm.moe(x, weights, ids, topk_weights))


def test_copies_of_experts_are_experts(weights, tokens):
    copies = np.array([0, 1, 2, 3, 4, 5, 6, 7, 3, 3])
    x, ids, topk_weights = tokens
    more = mm.pack_experts(*(leaf[copies] for leaf in weights.unpack()), num_experts=10)
    assert more.num_experts == 10
    elsewhere = jnp.where(ids == 3, jnp.arange(16, dtype=jnp.int32)[:, None] % 2 + 8, ids)
    np.testing.assert_array_equal(mm.moe(x, more, elsewhere, topk_weights), mm.moe(x, weights, ids, topk_weights))


@pytest.mark.parametrize("box", boxes.ALL)
def test_variables_are_taken_as_what_they_hold(weights, box):
    assert_same(mm.quantize_experts(*map(box, make_floats())), weights)
    assert_same(mm.pack_experts(*map(box, weights.unpack())), weights)
    assert_same(mm.stack_experts([box(weights), weights]), mm.stack_experts([weights, weights]))
    assert_same(mm.stack_experts(box([box(weights)])), mm.stack_experts([weights]))
    with pytest.raises(LayoutError, match="gate is an ExpertWeights, .* packed already"):
        mm.quantize_experts(box(weights), *make_floats()[1:])


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_kinds_of_arrays_give_the_same_weights(weights, convert):
    assert_same(mm.quantize_experts(*map(convert, make_floats())), weights)
    assert_same(jax.jit(mm.quantize_experts)(*map(convert, make_floats())), weights)
    assert_same(mm.pack_experts(*map(convert, weights.unpack())), weights)


ITERABLES = {"list": list, "tuple": tuple, "iter": iter, "generator": lambda layers: (layer for layer in layers)}


@pytest.mark.parametrize(("num_layers", "make"), one_in(2, [None, 3], ITERABLES))
def test_stacks_of_any_iterable(make, num_layers):
    layers = [mm.quantize_experts(*make_floats(seed)) for seed in range(3)]
    stacked = mm.stack_experts(make(layers), num_layers=num_layers)
    assert (stacked.num_layers, stacked.num_experts) == (3, E)
    for index, layer in enumerate(layers):
        assert_same(jax.tree.map(lambda leaf, i=index: leaf[i], stacked), layer)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(layers))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_filled_stacks_of_split_layers_are_split_and_so_are_traced_ones(weights, kind):
    sharding = NamedSharding(make_mesh(kind), P("expert"))
    split = jax.device_put(weights, sharding)
    fill = functools.partial(mm.stack_experts, num_layers=2)
    for stacked in (fill([split, split]), jax.jit(lambda a, b: fill([a, b]))(split, split)):
        assert_same(stacked, mm.stack_experts([weights, weights]))
        wanted = NamedSharding(sharding.mesh, P(None, "expert"))
        assert all(leaf.sharding.is_equivalent_to(wanted, leaf.ndim) for leaf in jax.tree.leaves(stacked))


def test_results_are_on_no_device_in_particular(weights):
    filled = mm.stack_experts([weights], num_layers=1)
    other = jax.devices("cpu")[1]
    # Arrays that are bound to a device would not go with one that is on another.
    for made in (mm.quantize_experts(*make_floats()), filled):
        assert (made.down_scale + jax.device_put(jnp.float32(1), other)).devices() == {other}
    there = jax.device_put(weights, other)
    assert mm.stack_experts([there], num_layers=1).down.devices() == {other}


def test_numbers_of_layers_that_are_not_so(weights):
    for num_layers, layers in ((3, [weights, weights]), (1, [])):
        with pytest.raises(ShapeError, match=f"num_layers is {num_layers}, wanted {len(layers)}, as many as weights"):
            mm.stack_experts(layers, num_layers=num_layers)
    for endless in ([weights, weights], itertools.repeat(weights)):
        with pytest.raises(ShapeError, match="num_layers is 1, wanted more, as weights gave more"):
            mm.stack_experts(endless, num_layers=1)
    wrong: tuple[Any, ...] = (0, -1, True, 1.0)
    for number in wrong:
        with pytest.raises(ShapeError, match="num_layers is .*, wanted a positive int"):
            mm.stack_experts([weights], num_layers=number)
    with pytest.raises(LayoutError, match="weights is an ExpertWeights, wanted the ExpertWeights of several layers"):
        mm.stack_experts(weights)
    with pytest.raises(LayoutError, match=r"weights\[1\] is a tuple, wanted ExpertWeights"):
        mm.stack_experts([weights, weights.unpack()])


def test_progress(weights):
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    mm.quantize_experts(*make_floats(), progress=tell)
    assert told == [(done, E) for done in range(1, E + 1)]
    told.clear()
    mm.quantize_experts(*map(jnp.asarray, make_floats()), progress=tell)
    assert told == [(E, E)]
    told.clear()
    mm.stack_experts((weights for _ in range(3)), num_layers=3, progress=tell)
    assert told == [(1, 3), (2, 3), (3, 3)]


# Dtypes of floats, and intermediate sizes.
INPUTS = {
    "bf16-128": (jnp.bfloat16, 128),
    "bf16-384": (jnp.bfloat16, 384),
    "bf16-768": (jnp.bfloat16, 768),
    "f32-128": (jnp.float32, 128),
    "f32-768": (jnp.float32, 768),
}


@pytest.mark.parametrize(("order", "input"), one_in(2, ["out_in", "in_out"], INPUTS))
def test_quantising_takes_at_most_twice_the_input(input, order):
    dtype, i = input
    shapes: list[tuple[int, ...]] = [(4, i, 1024), (4, i, 1024), (4, 1024, i)]
    if order == "in_out":
        shapes = [(e, b, a) for e, a, b in shapes]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    compiled = jax.jit(functools.partial(mm.quantize_experts, order=order)).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert total <= 2 * memory.argument_size_in_bytes


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_quantising_split_experts_moves_nothing_between_devices(kind):
    sharding = NamedSharding(make_mesh(kind), P("expert"))
    shapes = ((E, I, H), (E, I, H), (E, H, I))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    text = jax.jit(mm.quantize_experts).lower(*arguments).compile().as_text()
    assert text is not None
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


PEAK = """
import resource
import jax, jax.numpy as jnp, numpy as np
import jax_megamoe as mm

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

E, H, I, L = {sizes}
one = [np.ones(shape, jnp.bfloat16) for shape in ((1, I, H), (1, I, H), (1, H, I))]
layer = mm.quantize_experts(*one)  # compiles what is measured
mm.stack_experts([layer] * 2, num_layers=2)
{body}
"""


def measure(body: str, sizes: tuple[int, ...]) -> float:
    program = PEAK.format(body=body, sizes=sizes)
    # Where an earlier run has compiled the programs, the peak before is lower, and XLA's own memory counts.
    # And so much is computed here that optimising, which other tests do without, saves more time than it takes.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB there")
def test_quantising_numpy_arrays_takes_at_most_twice_the_input():
    body = """
before = peak()
floats = [np.ones((E, *array.shape[1:]), array.dtype) for array in one]
jax.block_until_ready(mm.quantize_experts(*floats))
print((peak() - before) / sum(array.nbytes for array in floats))
"""
    assert measure(body, (24, 1024, 1024, 1)) <= 2


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB there")
def test_filling_a_stack_takes_little_more_than_the_stack():
    body = """
before = peak()
stacked = mm.stack_experts((jax.tree.map(lambda leaf: leaf + 0, layer) for _ in range(L)), num_layers=L)
print((peak() - before) / stacked.nbytes)
"""
    assert measure(body, (1, 1024, 1024, 64)) <= 1.1


def test_layers_whose_other_arrays_differ_are_not_stacked(weights):
    as_bytes = dataclasses.replace(weights, gate_up=weights.gate_up.view(jnp.uint8))
    shorter = dataclasses.replace(weights, down=weights.down[:, :1])
    wider = dataclasses.replace(weights, down_scale=weights.down_scale.astype(jnp.bfloat16))
    for other, error, message in (
        (as_bytes, DTypeError, r"weights\.gate_up has dtype uint8, wanted float8_e4m3fn: if it holds .*\.view\("),
        (shorter, LayoutError, r"weights\.down has shape"),
        (wider, DTypeError, r"weights\.down_scale has dtype bfloat16"),
    ):
        for num_layers in (None, 2):
            with pytest.raises(error, match=message):
                mm.stack_experts(iter([weights, other]), num_layers=num_layers)
        with pytest.raises(error, match=message):
            other.unpack()


@pytest.mark.parametrize("with_context", [False, True], ids=["mesh of arguments", "mesh of context"])
def test_explicit_splits_that_differ_are_refused_by_name(weights, with_context):
    mesh = make_mesh(AxisType.Explicit)
    gate, up, down = make_floats()

    def put(value: Any, *spec: Any) -> Any:
        return jax.device_put(value, NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh) if with_context else contextlib.nullcontext():
        with pytest.raises(ShardingError, match="up is float32.* and gate .*, wanted the same split"):
            mm.quantize_experts(put(gate, "expert"), put(up), put(down, "expert"))
        with pytest.raises(ShardingError, match="gate is .*, wanted its matrices whole on each device"):
            mm.quantize_experts(*(put(value, None, None, "expert") for value in (gate, up, down)))
        layers = [put(weights, "expert"), put(weights)]
        for num_layers in (None, 2):
            with pytest.raises(
                ShardingError, match=r"weights\[1\]\.gate_up is .*, wanted all of it split like layer 0"
            ):
                mm.stack_experts(iter(layers), num_layers=num_layers)
        with pytest.raises(ShardingError, match=r"weights\.gate_up is .*, wanted its matrices whole"):
            put(weights, None, None, None, "expert").unpack()


def test_progress_is_a_function(weights):
    with pytest.raises(ArgumentError, match="progress is 3, wanted a function"):
        mm.quantize_experts(*make_floats(), progress=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="progress is 3, wanted a function"):
        mm.stack_experts([weights], progress=3)  # type: ignore[arg-type]
