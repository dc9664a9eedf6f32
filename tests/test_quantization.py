"""FP8 rounding and scales against ml_dtypes and exact arithmetic."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_megamoe import quantization
from tests.support import numpy_model

FP8 = ml_dtypes.float8_e4m3fn


def as_bytes(array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_rounding_is_to_nearest_even_and_saturates(transform):
    grid = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
    grid = np.unique(grid[np.isfinite(grid)])
    middles = (grid[1:] + grid[:-1]) / 2
    values = np.concatenate(
        [
            grid,
            middles,
            np.nextafter(middles, np.float32(np.inf)),
            np.nextafter(middles, np.float32(-np.inf)),
            np.array([0.0, -0.0, 464.0, 480.0, 3e38, -3e38, np.inf, -np.inf, 1e-30, np.nan], np.float32),
        ]
    )
    wanted = np.clip(values, -448, 448).astype(FP8)
    np.testing.assert_array_equal(as_bytes(transform(quantization.to_e4m3)(values)), as_bytes(wanted))


def test_rounding_does_not_go_through_half_precision():
    # Just above the middle of 1 and 1.125; half precision would round it to the middle, and that to even, 1.
    assert float(quantization.to_e4m3(jnp.float32(1.0625 + 2**-20))) == 1.125


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**14), 2.0**14, width=32), min_size=64, max_size=64))
def test_rounding_of_any_value(values):
    values = np.array(values, np.float32)
    rounded = jax.jit(quantization.to_e4m3)(values)
    np.testing.assert_array_equal(as_bytes(rounded), as_bytes(numpy_model.round_e4m3(values)))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_division_is_correctly_rounded(transform):
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(5000, 16)) * np.exp2(rng.integers(-20, 20, (5000, 16)))).astype(np.float32)
    b = np.abs(rng.normal(size=(5000, 1))).astype(np.float32)
    divide = transform(quantization.divide)
    np.testing.assert_array_equal(divide(a, b), a / b)
    np.testing.assert_array_equal(divide(a, 448.0), a / np.float32(448))
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38], np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(divide(special, np.float32(1e-5)), special / np.float32(1e-5))
    assert np.signbit(divide(special, np.float32(1e-5))[1])


@settings(max_examples=200, deadline=None)
@given(st.floats(np.float32(1e-30).item(), 2.0**100, width=32))
def test_power_of_two_scale_is_the_smallest_that_fits(amax):
    scale = float(quantization.power_of_two_scale(jnp.float32(amax)))
    assert math.frexp(scale)[0] == 0.5
    assert Fraction(scale) / 2 < Fraction(amax) / 448 <= Fraction(scale)


def test_power_of_two_scale_at_the_edges():
    amax = jnp.array([448, np.nextafter(np.float32(448), np.float32(449)), 224, 1e-30, np.inf, np.nan])
    scale = np.asarray(quantization.power_of_two_scale(amax))
    np.testing.assert_array_equal(scale, [1, 2, 0.5, 2.0**-108, np.inf, np.nan])


@pytest.mark.parametrize("magnitude", [1.0, 1e-6, 1e4])
def test_tokens_and_activations_match_the_numpy_model(magnitude):
    rows = (np.random.default_rng(1).normal(size=(50, 512)) * magnitude).astype(np.float32)
    rows[3], rows[4, :128] = 0, 0
    for quantize, arguments in (
        (quantization.quantize_tokens, (128, 1e-4, False)),
        (quantization.quantize_activations, (64, 1e-30, True)),
        (functools.partial(quantization.quantize_activations, block=128), (128, 1e-30, True)),
    ):
        values, scales = jax.jit(quantize)(rows)
        wanted, wanted_scales = numpy_model.quantize_rows(rows, *arguments)
        np.testing.assert_array_equal(scales, wanted_scales)
        np.testing.assert_array_equal(as_bytes(values), as_bytes(wanted))


def test_a_row_of_nan_or_infinity_stays_in_its_block():
    rows = np.ones((3, 256), np.float32)
    rows[0, 5], rows[1, 200] = np.nan, np.inf
    for quantize, block in ((quantization.quantize_tokens, 128), (quantization.quantize_activations, 64)):
        values, scales = quantize(jnp.asarray(rows))
        restored = np.asarray(values, np.float32) * np.repeat(scales, block, -1)
        finite = np.isfinite(restored).reshape(3, -1, block).all(-1)
        touched = np.zeros_like(finite)
        touched[0, 5 // block] = touched[1, 200 // block] = True
        np.testing.assert_array_equal(finite, ~touched)


def bf16_bits(value: float) -> int:
    return int(np.array(value, ml_dtypes.bfloat16).view(np.uint16))


def blocks_of_any_amax() -> np.ndarray:
    """Bits of BF16 numbers, [32640, 128]: each finite largest magnitude, with any magnitudes below, most of them near."""
    random, amax = np.random.default_rng(0), np.arange(bf16_bits(np.inf))[:, None]
    bits = (random.random((len(amax), 128)) * (amax + 1)).astype(int)
    near = np.maximum(amax - random.integers(0, 2500, bits.shape), 0)
    bits = np.where(random.random(bits.shape) < 0.7, near, bits)
    bits[amax[:, 0], random.integers(0, 128, len(amax))] = amax[:, 0]
    return bits | (random.random(bits.shape) < 0.5) << 15


def blocks_of_all_pairs() -> np.ndarray:
    """Bits of BF16 numbers, [N, 128]: largest magnitudes of a binade, and all below the floor whose FP8 values are not
    zero, each with all magnitudes below it that have FP8 values.
    """
    one, binade = bf16_bits(1.0), 128
    amax = np.concatenate([np.arange(bf16_bits(1e-10), bf16_bits(1e-4) + binade), np.arange(one, one + binade)])
    # 448 is 2^18 times the least number that is not rounded to zero, which is half a subnormal step.
    below = np.maximum(amax[:, None] - np.arange(20 * 127), 0).reshape(-1, 127)
    return np.concatenate([np.repeat(amax, 20)[:, None], below], 1) | (np.arange(128) % 2) << 15


@pytest.mark.parametrize("blocks", [blocks_of_any_amax, blocks_of_all_pairs])
@pytest.mark.parametrize("in_one_program", [False, True])
@pytest.mark.usefixtures("optimized")
def test_tokens_that_are_restored_have_the_same_values_and_scales(in_one_program, blocks):
    def restore(x: jax.Array) -> jax.Array:
        return quantization.restore_tokens(*quantization.quantize_tokens_to_send(x))

    x = blocks().astype(np.uint16).view(ml_dtypes.bfloat16)
    quantize = jax.jit(quantization.quantize_tokens)
    # In one program a compiler that optimises might skip what rounds in between.
    again = jax.jit(lambda x: quantize(restore(x))) if in_one_program else lambda x: quantize(jax.jit(restore)(x))
    values, scales = again(x)
    wanted, wanted_scales = numpy_model.quantize_rows(x.astype(np.float32), 128, 1e-4, False)
    np.testing.assert_array_equal(as_bytes(values), as_bytes(wanted))
    np.testing.assert_array_equal(np.asarray(scales).view(np.uint32), wanted_scales.view(np.uint32))


@pytest.mark.parametrize("num_tokens", [2, 64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.usefixtures("optimized")
def test_a_nan_or_infinity_is_restored_as_such(bad, num_tokens):
    """Where XLA has more than a few rows, its maximum on CPUs may lack NaN."""
    x = np.ones((num_tokens, 256), ml_dtypes.bfloat16)
    x[1::2, 130] = bad
    restored = jax.jit(quantization.restore_tokens)(*jax.jit(quantization.quantize_tokens_to_send)(x))
    finite = np.isfinite(np.asarray(restored, np.float32))
    assert finite[::2].all() and finite[1::2, :128].all() and not finite[1::2, 130].any()


def test_nan_is_restored_whatever_the_largest_magnitude_is():
    values = np.ones((5, 128), FP8)
    values[:, 7] = np.nan
    amax = np.array([0, 1, np.inf, np.nan, -np.nan], ml_dtypes.bfloat16)[:, None]
    restored = np.asarray(quantization.restore_tokens(jnp.asarray(values), jnp.asarray(amax)), np.float32)
    assert np.isnan(restored[:, 7]).all() and np.isfinite(restored[:2, :7]).all()


def test_numbers_that_a_compiler_left_in_fp32_are_sent_as_bf16():
    random = np.random.default_rng(0)
    x = (random.standard_normal((64, 512)) * np.exp2(random.integers(-20, 20, (64, 1)))).astype(np.float32)
    send = jax.jit(quantization.quantize_tokens_to_send)
    for found, wanted in zip(send(x), send(x.astype(ml_dtypes.bfloat16)), strict=True):
        np.testing.assert_array_equal(as_bytes(found), as_bytes(wanted))


@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(-40, 30), seed=st.integers(0, 99))
def test_blocks_use_their_whole_range(exponent, seed):
    rows, columns = 2, 3
    weight = (np.random.default_rng(seed).normal(size=(rows * 128, columns * 128)) * 2.0**exponent).astype(np.float32)
    values, scales = jax.jit(quantization.quantize_blocks)(weight)
    assert values.shape == weight.shape and scales.shape == (rows, columns)
    largest = np.abs(np.asarray(values, np.float32)).reshape(rows, 128, columns, 128).max((1, 3))
    np.testing.assert_array_equal(largest, 448)
    restored = np.asarray(jax.jit(quantization.dequantize_blocks)(values, scales))
    # Half a step of three mantissa bits, or of the smallest subnormal.
    bound = np.maximum(np.abs(weight) * 2.0**-4, np.asarray(scales).repeat(128, 0).repeat(128, 1) * 2.0**-10)
    assert (np.abs(restored - weight) <= bound * (1 + 1e-5)).all()


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64) * np.asarray(scales, np.float64).repeat(128, 0).repeat(128, 1)


E4M3_VALUES = [value for value in np.arange(256, dtype=np.uint8).view(FP8).astype(float) if math.isfinite(value)]
E2M1_VALUES = [sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


@settings(max_examples=40, deadline=None)
@given(
    # What the weights are made of, and over how many powers of two they may spread in one block.
    kind=st.sampled_from(
        [(E4M3_VALUES, 0), (E2M1_VALUES, 8), ([1.0], 16), ([0.0, -1.0], 9), ([-416.0, 1.125], 3), ([1.875, -1.75], 12)]
    ),
    exponent=st.integers(-100, 110),
    seed=st.integers(0, 99),
)
def test_blocks_that_a_power_of_two_makes_exact_lose_nothing(kind, exponent, seed):
    rng = np.random.default_rng(seed)
    values, spread = kind
    # One exponent for each 32 columns, as MXFP4 has them.
    exponents = np.repeat(exponent - rng.integers(0, spread + 1, (256, 12)), 32, 1)
    weight = (rng.choice(values, (256, 384)) * 2.0**exponents).astype(np.float32)
    weight[128:, 128:256] = 0
    quantized, scales = jax.jit(quantization.quantize_blocks)(weight)
    np.testing.assert_array_equal(dequantize(quantized, scales), weight)
    assert scales[1, 1] == 1 and (np.frexp(scales)[0] == 0.5).all()


@pytest.mark.parametrize("values", [[1.75 * 2.0**127], [2.0**127, -(2.0**112)], [2.0**-117], [2.0**-116, -(2.0**-125)]])
def test_exact_blocks_at_the_ends_of_fp32(values):
    weight = np.resize(np.array(values, np.float32), (128, 128))
    np.testing.assert_array_equal(dequantize(*jax.jit(quantization.quantize_blocks)(weight)), weight)


@pytest.mark.parametrize("exponent", [0, -60, 60])
# Five significant bits, or more; below the smallest subnormal, between two of them; five bits above 448.
@pytest.mark.parametrize("odd", [1.0625, 447.0, 1 / 3, 1 + 2.0**-23, 2.0**-10, 2.0**-9 * 1.5, 464.0, 2.0**-60])
def test_one_odd_value_among_exact_ones_makes_the_largest_448(odd, exponent):
    weight = np.random.default_rng(0).choice([320.0, 288.0, -1.0, 0.0], (128, 128))
    weight[7, 64] = odd
    weight = (weight * 2.0**exponent).astype(np.float32)
    quantized, scales = jax.jit(quantization.quantize_blocks)(weight)
    np.testing.assert_array_equal(scales, np.abs(weight).max() / np.float32(448))
    np.testing.assert_array_equal(as_bytes(quantized), as_bytes(numpy_model.round_e4m3(weight / scales[0, 0])))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_or_infinity_among_exact_values_is_not_lost(bad):
    weight = np.ones((128, 256), np.float32)
    weight[3, 4] = bad
    with np.errstate(invalid="ignore"):  # 0 * inf
        restored = dequantize(*jax.jit(quantization.quantize_blocks)(weight))
    assert np.isnan(restored[3, 4]) and (restored[:, 128:] == 1).all()


@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-45])
def test_blocks_without_a_normal_scale_have_scale_one(value):
    values, scales = quantization.quantize_blocks(jnp.full((128, 128), value))
    assert float(scales[0, 0]) == 1
    assert not np.asarray(values, np.float32).any()
