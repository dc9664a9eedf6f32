"""Biases of the projections, and sizes that are no multiples of 128: gpt-oss' experts have both."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe.errors import ArgumentError, DTypeError, LayoutError, ShapeError, ShardingError
from tests.support import numpy_model
from tests.support.cases import one_in
from tests.support.compare import difference
from tests.support.meshes import AUTO, EXPLICIT, make_mesh

E, K, T = 4, 2, 5
TOLERANCE = 1e-7
FORMATS = ("fp8_block", "fp8_channel", "mxfp4")
OF_ROWS = ("fp8_channel", "mxfp4")

# Some arguments are of types that they do not take.
moe: Any = mm.moe
reference: Any = mm.reference.moe
pack_experts: Any = mm.pack_experts
quantize_experts: Any = mm.quantize_experts


def make_experts(format: str, hidden: int, intermediate: int, seed: int = 0) -> numpy_model.Experts:
    rng = np.random.default_rng(seed)
    shapes = {"gate_up": (E, 2 * intermediate, hidden), "down": (E, hidden, intermediate)}
    if format == "mxfp4":
        arrays = []
        for e, n, k in shapes.values():
            arrays += [rng.integers(0, 256, (e, n, k // 2)).astype(np.uint8)]
            arrays += [rng.integers(118, 124, (e, n, k // 32)).astype(np.uint8)]
        return numpy_model.Experts(*arrays)
    arrays = []
    for name, (e, n, k) in shapes.items():
        parts = 2 if name == "gate_up" else 1
        blocks = (e, parts * -(-n // parts // 128), -(-k // 128))
        scale = np.exp2(rng.uniform(-6, 2, (e, n) if format == "fp8_channel" else blocks)).astype(np.float32) / 64
        arrays += [numpy_model.round_e4m3(rng.normal(size=(e, n, k))), scale]
    return numpy_model.Experts(*arrays)


def make_biases(hidden: int, intermediate: int, seed: int = 1) -> Any:
    """Of the size of the sums that they are added to."""
    rng = np.random.default_rng(seed)
    gate_up, down = rng.normal(size=(E, 2 * intermediate)), rng.normal(size=(E, hidden))
    return gate_up.astype(ml_dtypes.bfloat16), 8 * down.astype(ml_dtypes.bfloat16)


def make_tokens(hidden: int, tokens: int = T, seed: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, E, (tokens, K)).astype(np.int32)
    return (
        rng.normal(size=(tokens, hidden)).astype(ml_dtypes.bfloat16),
        ids,
        rng.uniform(-1, 1, (tokens, K)).astype(np.float32),
    )


def bytes_of(array: Any) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize(("format", "sizes"), one_in(3, FORMATS, [(256, 128), (160, 224), (96, 128)]))
def test_layer_agrees_with_the_model(format, sizes):
    experts, x = make_experts(format, *sizes), make_tokens(sizes[0])
    biases = make_biases(*sizes) if format in OF_ROWS else (None, None)
    weights = pack_experts(*experts, gate_up_bias=biases[0], down_bias=biases[1], pad=True)
    assert (weights.hidden_size, weights.intermediate_size) == sizes
    options: dict[str, Any] = {"activation_clamp": 3.0, "routed_scaling_factor": 0.5}
    y = moe(x[0], weights, *x[1:], activation=mm.SwiGLU(1.702, 1.0), **options)
    expected, _ = numpy_model.moe(
        x[0],
        experts,
        *x[1:],
        **options,
        gate_up_bias=biases[0],
        down_bias=biases[1],
        activate=lambda gate, up: gate / (1 + np.exp(-1.702 * gate)) * (up + 1),
    )
    assert y.shape == x[0].shape
    assert difference(y, expected) < TOLERANCE


@pytest.mark.parametrize("format", FORMATS)
@given(st.data())
@settings(max_examples=8, deadline=None)
def test_packing_loses_nothing(format, data):
    unit = 32 if format == "mxfp4" else 8
    hidden, intermediate = (unit * data.draw(st.integers(1, 300 // unit)) for _ in range(2))
    experts = make_experts(format, hidden, intermediate, seed=data.draw(st.integers(0, 9)))
    biases = make_biases(hidden, intermediate) if format in OF_ROWS else (None, None)
    weights = pack_experts(*experts, gate_up_bias=biases[0], down_bias=biases[1], pad=True)
    for found, wanted in zip(weights.unpack(), experts, strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_array_equal(bytes_of(found), bytes_of(wanted))
    shapes = (E, 2 * intermediate), (E, hidden)
    for found, bias, shape in zip(weights.unpack_biases(), biases, shapes, strict=True):
        assert found.shape == shape and found.dtype == np.float32
        np.testing.assert_array_equal(found, np.zeros(shape) if bias is None else bias.astype(np.float32))
    again = mm.ExpertWeights.from_arrays(weights.to_arrays())
    assert (again.hidden_size, again.intermediate_size) == (hidden, intermediate)


def floats_with_biases(format: str) -> tuple[list[np.ndarray], tuple[Any, Any]]:
    """Matrices of a hidden size of 160 and an intermediate size of 96, and biases where the format holds any."""
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=(E, n, k)).astype(np.float32) for n, k in ((96, 160), (96, 160), (160, 96))]
    return matrices, make_biases(160, 96) if format in OF_ROWS else (None, None)


@functools.cache
def padded_by_hand(format: Any) -> tuple[mm.ExpertWeights, jax.Array]:
    """Those with zeros behind, quantised, and their layer's result."""
    (gate, up, down), biases = floats_with_biases(format)
    wide = [np.pad(w, [(0, 0), (0, 32), (0, 96)]) for w in (gate, up)] + [np.pad(down, [(0, 0), (0, 96), (0, 32)])]
    if format in OF_ROWS:
        halves = biases[0].reshape(E, 2, 96)
        biases = np.pad(halves, [(0, 0), (0, 0), (0, 32)]).reshape(E, -1), np.pad(biases[1], [(0, 0), (0, 96)])
    weights = quantize_experts(*wide, format=format, gate_up_bias=biases[0], down_bias=biases[1])
    x, ids, probs = make_tokens(160)
    return weights, moe(np.pad(x, [(0, 0), (0, 96)]), weights, ids, probs)


@pytest.mark.parametrize(
    ("format", "convert", "order"),
    one_in(2, FORMATS, {"numpy": np.asarray, "jax": jnp.asarray}, ["out_in", "in_out"]),
)
def test_quantizing_pads_like_zeros(format, convert, order):
    """Weights padded by hand are the same bytes, whose layer is the same."""
    matrices, biases = floats_with_biases(format)
    matrices = [convert(w.swapaxes(1, 2) if order == "in_out" else w) for w in matrices]
    of_rows = {
        name: None if bias is None else convert(bias)
        for name, bias in zip(("gate_up_bias", "down_bias"), biases, strict=True)
    }
    narrow = quantize_experts(*matrices, format=format, order=order, **of_rows, pad=True)
    padded, wanted = padded_by_hand(format)
    assert (narrow.hidden_size, padded.hidden_size) == (160, 256)
    for found, leaf in zip(narrow.leaves, padded.leaves, strict=True):
        np.testing.assert_array_equal(bytes_of(found), bytes_of(leaf))
    np.testing.assert_array_equal(moe(make_tokens(160)[0], narrow, *make_tokens(160)[1:]), wanted[:, :160])


def test_other_ways_to_call_it():
    """Stacked, shared, over a mesh, in shard_map, under vmap, by the reference: all like the plain call."""
    sizes = (160, 96)
    biases = dict(zip(("gate_up_bias", "down_bias"), make_biases(*sizes), strict=True))
    weights = pack_experts(*make_experts("mxfp4", *sizes), **biases, pad=True)
    x, ids, probs = make_tokens(sizes[0], tokens=8)
    y = moe(x, weights, ids, probs)
    stacked = mm.stack_experts([weights, weights])
    np.testing.assert_array_equal(y, jax.jit(moe)(x, stacked, ids, probs, layer=1))
    np.testing.assert_array_equal(y, reference(x, weights, ids, probs))
    mapped = jax.vmap(moe, in_axes=(0, None, 0, 0))(x[:, None], weights, ids[:, None], probs[:, None])
    np.testing.assert_array_equal(y, mapped[:, 0])
    one = dataclasses.replace(jax.tree.map(lambda leaf: leaf[:1], weights), num_experts=1)
    shared = moe(x, weights, ids, probs, shared=one)
    as_slot = (
        np.concatenate([ids, np.zeros((8, 1), np.int32)], 1),
        np.concatenate([probs, np.ones((8, 1), np.float32)], 1),
    )
    np.testing.assert_array_equal(shared, moe(x, weights, *as_slot))
    mesh = make_mesh({"data": 2, "expert": 4}, AUTO)
    split = jax.device_put(weights, NamedSharding(mesh, P("expert")))
    with mesh:
        np.testing.assert_array_equal(y, jax.jit(moe)(x, split, ids, probs))


def test_errors():
    sizes = (160, 96)
    gate_up_bias, down_bias = make_biases(*sizes)
    experts = make_experts("fp8_channel", *sizes)
    with pytest.raises(ShapeError, match="H is 160, wanted a positive multiple of 128: pass pad=True"):
        pack_experts(*experts)
    with pytest.raises(ShapeError, match="I is 80, wanted a positive multiple of 32: pad the weights"):
        quantize_experts(*(np.zeros((1, 80, 64), np.float32),) * 2, np.zeros((1, 64, 80)), format="mxfp4", pad=True)
    with pytest.raises(LayoutError, match="down_bias is given, wanted None: fp8_block holds no biases"):
        pack_experts(*make_experts("fp8_block", *sizes), down_bias=down_bias, pad=True)
    with pytest.raises(LayoutError, match="gate_up_bias is given, wanted None"):
        quantize_experts(*np.zeros((3, E, 128, 128), np.float32), gate_up_bias=np.zeros((E, 256), np.float32))
    with pytest.raises(ShapeError, match=r"gate_up_bias has shape \(4, 160\), wanted \(4, 192\), that is \[E, 2I\]"):
        pack_experts(*experts, gate_up_bias=down_bias, pad=True)
    with pytest.raises(DTypeError, match="down_bias has dtype int32, wanted bfloat16"):
        pack_experts(*experts, down_bias=np.zeros((E, 160), np.int32), pad=True)
    with pytest.raises(ArgumentError, match="pad is 'yes', wanted True or False"):
        pack_experts(*experts, pad="yes")
    weights = pack_experts(*experts, pad=True)
    x, ids, probs = make_tokens(256)
    with pytest.raises(ShapeError, match=r"x has shape \(5, 256\), wanted \[..., 160\]"):
        moe(x, weights, ids, probs)


def test_biases_are_split_like_the_weights():
    mesh = make_mesh({"expert": 4}, EXPLICIT)
    with jax.set_mesh(mesh):
        experts = [jax.device_put(array, P("expert")) for array in make_experts("mxfp4", 160, 96)]
        gate_up_bias, down_bias = make_biases(160, 96)
        with pytest.raises(ShardingError, match="down_bias"):
            pack_experts(*experts, down_bias=jax.device_put(down_bias, P()), pad=True)
        split = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
        split = {name: jax.device_put(bias, P("expert")) for name, bias in split.items()}
        weights = jax.jit(lambda *a, **b: pack_experts(*a, **b, pad=True))(*experts, **split)
        assert all(leaf.sharding.spec[0] == "expert" for leaf in weights.leaves)
        assert all(bias.sharding.spec[0] == "expert" for bias in weights.unpack_biases())
        np.testing.assert_array_equal(weights.unpack_biases()[1], down_bias.astype(np.float32))


@pytest.mark.parametrize("format", FORMATS)
def test_padding_takes_no_more_memory(format):
    """Weights are padded part by part: input, result and what is needed meanwhile are at most twice the input."""
    weight = jax.ShapeDtypeStruct((1, 2880, 2880), jnp.bfloat16)
    program = jax.jit(functools.partial(quantize_experts, format=format, pad=True)).lower(weight, weight, weight)
    memory: Any = program.compile().memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert total < 2 * memory.argument_size_in_bytes


def random_matrices(sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, n, k)).astype(np.float32) for n, k in 2 * [sizes[::-1]] + [sizes]]


@functools.cache
def quantized_wide(format: Any, sizes: tuple[int, int]) -> mm.ExpertWeights:
    """With zeros up to multiples of 128. test_formats.py has that the order of what is so wide makes no difference."""
    wide = [np.pad(m, [(0, 0), (0, -m.shape[1] % 128), (0, -m.shape[2] % 128)]) for m in random_matrices(sizes)]
    return quantize_experts(*wide, format=format)


@pytest.mark.parametrize(
    ("format", "sizes", "order"),
    one_in(4, FORMATS, [(32, 32), (64, 160), (416, 96), (288, 800)], ["out_in", "in_out"]),
)
def test_quantizing_any_size_is_like_zeros_behind(format, sizes, order):
    matrices = random_matrices(sizes)
    if order == "in_out":
        matrices = [m.swapaxes(1, 2) for m in matrices]
    found, wanted = quantize_experts(*matrices, format=format, order=order, pad=True), quantized_wide(format, sizes)
    assert (found.hidden_size, found.intermediate_size) == sizes
    for leaf, other in zip(found.leaves, wanted.leaves, strict=True):
        np.testing.assert_array_equal(bytes_of(leaf), bytes_of(other))
