"""FP8 with a scale per row or per matrix: all forms of the scales, the layer, and quantising to it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_megamoe as mm
from tests.support import numpy_model
from tests.support.compare import difference

E, H, I = 3, 256, 128
# The order of FP32 sums, and FP8 values that it moves across a rounding boundary.
TOLERANCE = 1e-7


def as_bytes(array: Any) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


def make_experts(of_gate_up: tuple[int, ...], of_down: tuple[int, ...], seed: int = 0) -> numpy_model.Experts:
    """Random values, and scales of these shapes after E."""
    rng = np.random.default_rng(seed)

    def scale(shape: tuple[int, ...]) -> np.ndarray:
        # Far from each other: one in a wrong place shows.
        return np.exp2(rng.uniform(-6, 2, (E, *shape))).astype(np.float32) / 64

    return numpy_model.Experts(
        numpy_model.round_e4m3(rng.normal(size=(E, 2 * I, H))),
        scale(of_gate_up),
        numpy_model.round_e4m3(rng.normal(size=(E, H, I))),
        scale(of_down),
    )


FORMS = {
    "rows": ((2 * I,), (H,)),
    "columns of one": ((2 * I, 1), (H, 1)),
    "matrices": ((), ()),
    "gate, up and down": ((2,), ()),
    "rows and matrices": ((2 * I,), ()),
    "matrices and rows": ((2,), (H, 1)),
}


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("form", FORMS)
def test_scales_of_rows_and_of_matrices(form, convert):
    experts = make_experts(*FORMS[form])
    weights = mm.pack_experts(*jax.tree.map(convert, experts))
    assert (weights.format, weights.layout) == ("fp8_channel", "sm90_fp8_channel_v2")
    gate_up, gate_up_scale, down, down_scale = map(np.asarray, weights.unpack())
    np.testing.assert_array_equal(as_bytes(gate_up), as_bytes(experts.gate_up))
    np.testing.assert_array_equal(as_bytes(down), as_bytes(experts.down))
    for found, scale, rows in ((gate_up_scale, experts.gate_up_scale, 2 * I), (down_scale, experts.down_scale, H)):
        assert found.dtype == np.float32 and found.shape == (E, rows)
        scale = scale.reshape(E, -1)
        np.testing.assert_array_equal(found, scale.repeat(rows // scale.shape[1], 1))

    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, H)).astype(numpy_model.BF16)
    ids, topk_weights = rng.integers(-1, E, (6, 2)).astype(np.int32), rng.random((6, 2), np.float32)
    wanted, _ = numpy_model.moe(x, experts, ids, topk_weights)
    for moe in (mm.moe, mm.reference.moe):
        y = moe(jnp.asarray(x), weights, jnp.asarray(ids), jnp.asarray(topk_weights))
        assert difference(y, wanted) < TOLERANCE


def test_scales_and_biases_lie_where_the_definition_puts_them():
    experts = make_experts((2 * I,), (H,))
    gate_up_bias = np.arange(E * 2 * I, dtype=np.float32).reshape(E, 2 * I)
    down_bias = np.arange(E * H, dtype=np.float32).reshape(E, H)
    weights = mm.pack_experts(*experts, gate_up_bias=gate_up_bias, down_bias=down_bias)
    assert weights.gate_up_scale.shape == (E, I // 64, 128, 2) and weights.down_scale.shape == (E, H // 64, 64, 2)
    for expert, tile, plane, column, part in np.ndindex(E, I // 64, 2, 32, 2):
        row = part * I + 64 * tile + 32 * plane + column
        found = np.asarray(weights.gate_up_scale)[expert, tile, 64 * plane + np.array([column, 32 + column]), part]
        assert (found == [experts.gate_up_scale[expert, row], gate_up_bias[expert, row]]).all()
    for expert, tile, pair, part in np.ndindex(E, H // 64, 32, 2):
        row = 64 * tile + 2 * pair + part
        found = np.asarray(weights.down_scale)[expert, tile, np.array([pair, 32 + pair]), part]
        assert (found == [experts.down_scale[expert, row], down_bias[expert, row]]).all()
    of_blocks = mm.pack_experts(
        experts.gate_up, np.ones((E, 2, 2), np.float32), experts.down, np.ones((E, 2, 1), np.float32)
    )
    np.testing.assert_array_equal(as_bytes(weights.gate_up), as_bytes(of_blocks.gate_up))
    np.testing.assert_array_equal(as_bytes(weights.down), as_bytes(of_blocks.down))


def test_bf16_scales_are_widened():
    experts = make_experts((2 * I, 1), ())
    narrow = [scale.astype(numpy_model.BF16) for scale in (experts.gate_up_scale, experts.down_scale)]
    unpacked = mm.pack_experts(experts.gate_up, narrow[0], experts.down, narrow[1]).unpack()
    np.testing.assert_array_equal(unpacked[1], narrow[0].astype(np.float32)[..., 0])
    np.testing.assert_array_equal(unpacked[3], narrow[1].astype(np.float32)[:, None].repeat(H, 1))


@pytest.mark.parametrize("num_experts", [1, 2, 128, 256])
def test_no_number_of_experts_is_taken_for_another_dimension(num_experts):
    """E = 2, = H, = 2I and = I: shapes that agree by chance."""
    gate_up = np.ones((num_experts, 256, 128), numpy_model.FP8)
    down = np.ones((num_experts, 128, 128), numpy_model.FP8)
    rng = np.random.default_rng(0)
    for of_gate_up, of_down, format in (
        ((), (), "fp8_channel"),
        ((2,), (), "fp8_channel"),
        ((256,), (128,), "fp8_channel"),
        ((2, 1), (1, 1), "fp8_block"),
    ):
        scales = [rng.random((num_experts, *shape), np.float32) for shape in (of_gate_up, of_down)]
        weights = mm.pack_experts(gate_up, scales[0], down, scales[1])
        assert weights.format == format
        unpacked = numpy_model.Experts(*(np.asarray(leaf)[-2:] for leaf in weights.unpack()))
        np.testing.assert_array_equal(
            numpy_model.dequantize_matrices(unpacked.gate_up, unpacked.gate_up_scale),
            numpy_model.dequantize_matrices(gate_up[-2:], scales[0][-2:]),
        )


def quantize(*floats: np.ndarray, **options: Any) -> numpy_model.Experts:
    unpacked = mm.quantize_experts(*floats, format="fp8_channel", **options).unpack()
    return numpy_model.Experts(*map(np.asarray, unpacked))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), exponent=st.integers(-60, 60))
def test_rows_use_their_whole_range(seed, exponent):
    rng = np.random.default_rng(seed)
    shapes = ((E, I, H), (E, I, H), (E, H, I))
    gate, up, down = ((rng.normal(size=shape) * 2.0**exponent).astype(np.float32) for shape in shapes)
    found = quantize(gate, up, down)
    for values, scale, weight in (
        (found.gate_up, found.gate_up_scale, np.concatenate([gate, up], axis=1)),
        (found.down, found.down_scale, down),
    ):
        np.testing.assert_array_equal(scale, np.abs(weight).max(-1) / np.float32(448))
        np.testing.assert_array_equal(as_bytes(values), as_bytes(numpy_model.round_e4m3(weight / scale[..., None])))


@pytest.mark.parametrize("order", ["out_in", "in_out"])
def test_rows_that_a_power_of_two_makes_exact_lose_nothing(order):
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = rng.choice([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], (E, rows, columns))
        exponents = rng.integers(-8, -2, (E, rows, columns // 32)).repeat(32, -1)
        # Rows that are far apart: one scale of a block would not hold them.
        return (values * np.exp2(exponents + rng.integers(-40, 40, (E, rows, 1)))).astype(np.float32)

    gate, up, down = matrix(I, H), matrix(I, H), matrix(H, I)
    down[1, 7] = 0
    floats = (gate, up, down) if order == "out_in" else tuple(array.swapaxes(1, 2) for array in (gate, up, down))
    found = quantize(*floats, order=order)
    np.testing.assert_array_equal(
        numpy_model.dequantize_matrices(found.gate_up, found.gate_up_scale), np.concatenate([gate, up], axis=1)
    )
    np.testing.assert_array_equal(numpy_model.dequantize_matrices(found.down, found.down_scale), down)
    assert (np.frexp(found.gate_up_scale)[0] == 0.5).all() and found.down_scale[1, 7] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_or_infinity_makes_nan_of_what_its_row_reaches(bad):
    gate, up, down = (np.ones(shape, np.float32) for shape in ((E, I, H), (E, I, H), (E, H, I)))
    down[1, 9, 100] = bad
    weights = mm.quantize_experts(gate, up, down, format="fp8_channel")
    y = mm.moe(jnp.ones((2, H), jnp.bfloat16), weights, jnp.array([[0], [1]]), jnp.ones((2, 1)))
    assert np.argwhere(np.isnan(np.asarray(y, np.float32))).tolist() == [[1, 9]]
