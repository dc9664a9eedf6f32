"""MXFP4: its bits where the layout wants them, its values, what cannot be served, and quantising to it."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_megamoe as mm
from jax_megamoe import mxfp4, weight_layout
from jax_megamoe.errors import ArgumentError
from tests.support import numpy_model
from tests.support.compare import difference

E, H, I = 2, 256, 128
E8M0 = ml_dtypes.float8_e8m0fnu
# The order of FP32 sums, and FP8 values that it moves across a rounding boundary.
TOLERANCE = 1e-7

Experts = numpy_model.Experts


def random_experts(seed: int = 0, low: int = 110, high: int = 125, e: int = E, h: int = H, i: int = I) -> Experts:
    """Random codes, and exponents of low to high."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        codes = rng.integers(0, 256, (e, rows, columns // 2), np.uint8)
        return codes, rng.integers(low, high + 1, (e, rows, columns // 32)).astype(np.uint8).view(E8M0)

    return Experts(*matrix(2 * i, h), *matrix(h, i))


def as_bytes(array: Any) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


def assert_same(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(as_bytes(a), as_bytes(b))


def values_of(weights: mm.ExpertWeights) -> tuple[np.ndarray, np.ndarray]:
    """gate_up and down in float64, from what is packed."""
    natural = Experts(*map(np.asarray, weights.unpack()))
    return (
        numpy_model.dequantize_mxfp4(natural.gate_up, natural.gate_up_scale),
        numpy_model.dequantize_mxfp4(natural.down, natural.down_scale),
    )


def pack_naively(codes: np.ndarray, exponents: np.ndarray, *, is_gate_up: bool) -> tuple[np.ndarray, np.ndarray]:
    """One expert's planes and row scales, bit by bit from the definition of the layout."""
    num_rows, columns = codes.shape[0], 2 * codes.shape[1]
    exponents = exponents.astype(int)
    nibbles = np.empty((num_rows, columns), int)
    nibbles[:, 0::2], nibbles[:, 1::2] = codes % 16, codes // 16
    bases, scales = [], []
    for row in range(num_rows):
        used = [e for s, e in enumerate(exponents[row]) if (nibbles[row, 32 * s : 32 * s + 32] % 8).any()]
        base = max((max(used) if used else 127) - 26, 0)
        bases.append(base)
        scales.append(2.0 ** (base - 114))
    planes = 2 if is_gate_up else 1
    tiles = num_rows // (64 * planes)
    packed = np.zeros((tiles, columns // 128, planes * 4352), np.uint8)
    # Of each plane 32 pairs of scales, and then of biases, which are zeros here.
    row_scales = np.zeros((tiles, 64 * planes, 2), np.float32)
    for tile, plane, r, block in np.ndindex(tiles, planes, 64, columns // 128):
        g, q = r // 16, r % 16
        if is_gate_up:
            column = 32 * plane + 8 * g + q % 8
            row = 64 * tile + column + (num_rows // 2 if q >= 8 else 0)
            row_scales[tile, 64 * plane + column % 32, q // 8] = scales[row]
        else:
            column = 16 * g + 2 * (q % 8) + q // 8
            row = 64 * tile + column
            row_scales[tile, column // 2, column % 2] = scales[row]
        image = packed[tile, block, 4352 * plane : 4352 * (plane + 1)]
        w, rh = r // 16, r % 16 // 8
        for s in range(4):
            at = 4096 + w * 64 + (r % 8) * 8 + s % 2 * 4 + s // 2 * 2 + rh
            image[at] = (exponents[row, 4 * block + s] - bases[row]) % 256
            for c in range(4):
                word = 0
                for i in range(4):
                    column = 128 * block + 64 * (s // 2) + 16 * c + 8 * (s % 2) + i
                    low, high = int(nibbles[row, column]), int(nibbles[row, column + 4])
                    word |= low % 8 << 4 * i | high % 8 << 16 + 4 * i | low // 8 << 8 * i + 7 | high // 8 << 8 * i + 3
                lane = 4 * (r % 8) + c
                index = s // 2 * 512 + w * 128 + lane * 4 + 2 * (s % 2) + rh
                image[4 * index : 4 * index + 4] = list(word.to_bytes(4, "little"))
    return packed, row_scales


@pytest.mark.parametrize(("h", "i"), [(128, 128), (256, 128), (128, 256)])
def test_bits_lie_where_the_definition_puts_them(h, i):
    experts = random_experts(h + i, low=90, high=116, h=h, i=i)
    rng = np.random.default_rng(1)
    for codes, scale in ((experts.gate_up, experts.gate_up_scale), (experts.down, experts.down_scale)):
        groups = codes.reshape(*scale.shape, 16)
        zeros = np.asarray(rng.random(scale.shape) < 0.3)
        zeros[0, 5] = True  # a row of zeros
        groups[zeros] &= 0x88  # of either sign, with any exponent
        scale.view(np.uint8)[zeros] = rng.integers(0, 255, zeros.sum())
    weights = mm.pack_experts(*experts)
    for expert in range(E):
        for name, is_gate_up in (("gate_up", True), ("down", False)):
            codes, scale = getattr(experts, name)[expert], getattr(experts, f"{name}_scale")[expert]
            planes, row_scales = pack_naively(codes, scale.view(np.uint8), is_gate_up=is_gate_up)
            np.testing.assert_array_equal(getattr(weights, name)[expert], planes)
            np.testing.assert_array_equal(getattr(weights, f"{name}_scale")[expert], row_scales)
    assert_same(weights.unpack(), experts)


def test_the_low_nibble_is_the_lower_column():
    experts = random_experts()
    experts.down[:], experts.down_scale.view(np.uint8)[:] = 0, 127
    experts.down[1, 3, 10] = 0x7A  # columns 20 and 21
    _, values = values_of(mm.pack_experts(*experts))
    assert values[1, 3, 20:22].tolist() == [-1.0, 6.0] and np.count_nonzero(values) == 2
    wide = np.zeros((E, H, I), ml_dtypes.float4_e2m1fn)
    wide[1, 3, 20:22] = [-1, 6]
    for down in (wide, jnp.asarray(wide)):
        packed = mm.pack_experts(experts.gate_up, experts.gate_up_scale, down, experts.down_scale)
        assert_same(packed.leaves, mm.pack_experts(*experts).leaves)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_all_forms_of_the_arrays_give_the_same_weights(convert):
    experts = random_experts(3)
    weights = mm.pack_experts(*experts)
    assert (weights.format, weights.layout) == ("mxfp4", "sm90_mxfp4_v3")
    assert (weights.num_experts, weights.hidden_size, weights.intermediate_size) == (E, H, I)
    assert weights.nbytes == E * (3 * I * H * 17 // 32 + 2 * 4 * (2 * I + H))

    def float4(codes: np.ndarray) -> np.ndarray:
        nibbles = np.stack([codes % 16, codes // 16], axis=-1)
        return nibbles.reshape(*codes.shape[:-1], -1).view(ml_dtypes.float4_e2m1fn)

    for change in (
        {},
        {"gate_up": experts.gate_up.view(np.int8), "down": experts.down.view(np.int8)},
        {"gate_up": float4(experts.gate_up), "down": float4(experts.down)},
        {"gate_up": float4(experts.gate_up)},
        {"gate_up_scale": as_bytes(experts.gate_up_scale), "down_scale": as_bytes(experts.down_scale)},
    ):
        arguments = jax.tree.map(convert, experts._replace(**change))
        assert_same(mm.pack_experts(*arguments).leaves, weights.leaves)
        assert_same(jax.jit(mm.pack_experts)(*arguments).leaves, weights.leaves)


def one_group(exponents: np.ndarray, columns: int = H) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all codes twice in the first group, with these exponents, and zeros after them."""
    codes = np.zeros((len(exponents), columns // 2), np.uint8)
    codes[:, :16] = np.arange(16) * 16 + np.arange(16)[::-1]
    scale = np.full((len(exponents), columns // 32), 127, np.uint8)
    scale[:, 0] = exponents
    return codes, scale


def test_all_codes_with_all_exponents():
    codes, scale = one_group(np.arange(256) % 255, I)
    experts = random_experts(e=1)._replace(down=codes[None], down_scale=scale[None])
    weights = mm.pack_experts(*experts)
    assert_same(weights.unpack()[:3], experts[:3])
    np.testing.assert_array_equal(as_bytes(weights.unpack()[3]), experts.down_scale)
    # As the kernel and the reference decode them, without the row's scale, which is a power of two that FP32 holds.
    stored_codes, d = mxfp4.unpack_down(weights.down[0])
    decoded = np.asarray(mxfp4.decode(stored_codes, d)).astype(np.float64)
    as_e5m2 = decoded.astype(ml_dtypes.float8_e5m2)
    np.testing.assert_array_equal(as_e5m2.astype(np.float64), decoded)
    row_scale = np.asarray(weight_layout.unpack_down_row_scale(weights.down_scale[0])).astype(np.float64)
    found = decoded * row_scale[:, None]
    wanted = numpy_model.dequantize_mxfp4(codes, scale)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))
    assert set(np.abs(found[127, :32])) == set(numpy_model.E2M1_VALUES)


@pytest.mark.parametrize("moe", [mm.moe, mm.reference.moe])
def test_every_spread_within_a_row_is_exact_in_the_layer(moe):
    """All codes, in each column of the result with another exponent, from 2^-60 on."""
    exponents = np.arange(H) % 90 + 67
    codes, scale = one_group(exponents, I)
    experts = random_experts(e=1)._replace(down=codes[None], down_scale=scale[None])
    x = np.random.default_rng(0).normal(size=(4, H)).astype(numpy_model.BF16)
    ids, topk_weights = np.zeros((4, 1), np.int32), np.ones((4, 1), np.float32)
    y = np.asarray(moe(jnp.asarray(x), mm.pack_experts(*experts), ids, topk_weights), np.float64)
    wanted, _ = numpy_model.moe(x, experts, ids, topk_weights)
    # Column by column, since their sizes differ.
    for column in range(H):
        assert difference(y[:, column], wanted[:, column]) < 1e-4
    # All columns are one column times a power of two, and so are their roundings.
    np.testing.assert_array_equal(y, y[:, :1] * np.exp2(exponents - float(exponents[0])))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    largest=st.integers(26, 254),
    spread=st.integers(0, 26),
    zeros=st.sampled_from([0, 0.2, 1]),
)
def test_all_bits_come_back_and_values_are_exact(seed, largest, spread, zeros):
    experts = random_experts(seed, largest - spread, largest)
    rng = np.random.default_rng(seed)
    for name in ("gate_up", "down"):
        codes, scale = getattr(experts, name), getattr(experts, f"{name}_scale")
        are_zeros = rng.random(scale.shape) < zeros
        codes.reshape(*scale.shape, 16)[are_zeros] &= 0x88
        scale.view(np.uint8)[are_zeros] = rng.integers(0, 255, are_zeros.sum())
    weights = mm.pack_experts(*experts)
    assert_same(weights.unpack(), experts)
    codes, d = mxfp4.unpack_gate_up(weights.gate_up)
    scales = np.asarray(weight_layout.unpack_gate_up_row_scale(weights.gate_up_scale)).astype(np.float64)
    np.testing.assert_array_equal(
        np.asarray(mxfp4.decode(codes, d)).astype(np.float64) * scales[..., None],
        numpy_model.dequantize_mxfp4(experts.gate_up, experts.gate_up_scale),
    )


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), spread=st.integers(0, 26))
def test_the_layer_is_that_of_the_numpy_model(seed, spread):
    experts = random_experts(seed, 120 - spread, 120)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(5, H)).astype(numpy_model.BF16)
    ids, topk_weights = rng.integers(-1, E + 1, (5, 2)).astype(np.int32), rng.random((5, 2), np.float32)
    wanted, _ = numpy_model.moe(x, experts, ids, topk_weights)
    y = mm.moe(jnp.asarray(x), mm.pack_experts(*experts), jnp.asarray(ids), jnp.asarray(topk_weights))
    # Drawn inputs come close to ties (tests/test_reference.py).
    assert difference(y, wanted) < 1e-5


def spoil(experts: Experts, name: str, expert: int, row: int, **exponents: int) -> Experts:
    """The experts with a one, and this exponent, in the groups that are named by number."""
    codes, scale = getattr(experts, name).copy(), as_bytes(getattr(experts, f"{name}_scale")).copy()
    for group, exponent in exponents.items():
        index = int(group.removeprefix("g"))
        codes[expert, row, 16 * index] |= 0x02
        scale[expert, row, index] = exponent
    return experts._replace(**{name: codes, f"{name}_scale": scale.view(E8M0)})


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("name", "row", "exponents", "message"),
    [
        ("gate_up", 200, {"g1": 85, "g7": 112}, "row 200 of expert 1 of gate_up has E8M0 exponents from 85 to 112, "),
        (
            "down",
            3,
            {"g0": 0, "g1": 254},
            "row 3 of expert 1 of down has E8M0 exponents from 0 to 254, wanted at most 26",
        ),
        ("gate_up", 7, {"g3": 255}, "row 7 of expert 1 of gate_up has an E8M0 exponent of 255, which is NaN, wanted 0"),
        ("down", 255, {"g3": 255}, "row 255 of expert 1 of down has an E8M0 exponent of 255"),
    ],
)
def test_exponents_that_cannot_be_served_are_refused(name, row, exponents, message, convert):
    experts = jax.tree.map(convert, spoil(random_experts(0, 111, 112), name, 1, row, **exponents))
    with pytest.raises(ArgumentError, match=message):
        mm.pack_experts(*experts)


def test_26_binades_are_served_and_groups_of_zeros_may_have_any_exponent_but_nan():
    experts = spoil(random_experts(0, 112, 112), "gate_up", 0, 9, g2=86)
    experts.gate_up[0, 10, 16:32] = 0x80
    scale = as_bytes(experts.gate_up_scale)
    scale[0, 10, 1] = 0
    assert_same(mm.pack_experts(*experts).unpack(), experts)
    scale[0, 10, 1] = 255
    with pytest.raises(ArgumentError, match="row 10 of expert 0 of gate_up has an E8M0 exponent of 255"):
        mm.pack_experts(*experts)


def test_what_is_refused_is_nan_where_it_cannot_be_looked_at():
    experts = spoil(random_experts(0, 111, 112), "gate_up", 1, 200, g1=85, g7=112)
    experts = spoil(experts, "down", 0, 40, g1=255)
    traced = jax.jit(mm.pack_experts)(*experts)
    assert_same(traced.unpack(), experts)
    rows = weight_layout.unpack_gate_up_row_scale(traced.gate_up_scale)
    assert np.argwhere(np.isnan(rows)).tolist() == [[1, 200]]
    rows = weight_layout.unpack_down_row_scale(traced.down_scale)
    assert np.argwhere(np.isnan(rows)).tolist() == [[0, 40]]
    y = mm.moe(jnp.ones((2, H), jnp.bfloat16), traced, jnp.array([[0], [1]]), jnp.ones((2, 1)))
    nans = np.isnan(np.asarray(y, np.float32))
    # A NaN in the activations reaches its token's whole row, one in a row of down its column.
    assert nans[1].all() and np.flatnonzero(nans[0]).tolist() == [40]


def quantize(gate: np.ndarray, up: np.ndarray, down: np.ndarray, **options: Any) -> mm.ExpertWeights:
    return mm.quantize_experts(gate, up, down, format="mxfp4", **options)


def quantized_values(gate_up: np.ndarray, down: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    gate, up = (part.astype(dtype) for part in np.split(gate_up, 2, axis=1))
    return values_of(quantize(gate, up, down.astype(dtype)))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    largest=st.integers(30, 245),
    spread=st.integers(0, 20),
    dtype=st.sampled_from([np.float32, numpy_model.BF16]),
)
def test_values_of_mxfp4_are_kept_exactly(seed, largest, spread, dtype):
    experts = random_experts(seed, largest - spread, largest)
    wanted = (
        numpy_model.dequantize_mxfp4(experts.gate_up, experts.gate_up_scale),
        numpy_model.dequantize_mxfp4(experts.down, experts.down_scale),
    )
    for found, value in zip(quantized_values(*wanted, dtype), wanted, strict=True):
        np.testing.assert_array_equal(found, value)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(value))


@pytest.mark.parametrize("dtype", [np.float32, numpy_model.BF16])
def test_the_smallest_exponents_are_kept_exactly(dtype):
    """Their values are subnormal FP32 numbers, which arithmetic may take for zero."""
    experts = random_experts(0, 0, 3)
    wanted = (
        numpy_model.dequantize_mxfp4(experts.gate_up, experts.gate_up_scale),
        numpy_model.dequantize_mxfp4(experts.down, experts.down_scale),
    )
    for found, value in zip(quantized_values(*wanted, dtype), wanted, strict=True):
        np.testing.assert_array_equal(found, value)


def test_powers_of_two_are_kept_exactly():
    rng = np.random.default_rng(0)
    # Four binades in a group, which is what E2M1 has, and others in other groups.
    exponents = rng.integers(-3, 1, (E, 2 * I, H)) + rng.integers(-8, 8, (E, 2 * I, H // 32)).repeat(32, -1)
    gate_up = np.exp2(exponents.astype(np.float64))
    found, _ = quantized_values(gate_up, np.ones((E, H, I)), np.float32)
    np.testing.assert_array_equal(found, gate_up)


def round_e2m1(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even codes, in float64."""
    magnitudes = np.array(numpy_model.E2M1_VALUES)
    distances = np.abs(np.abs(values)[..., None] - magnitudes)
    nearest = distances == distances.min(-1, keepdims=True)
    even = nearest & (np.arange(8) % 2 == 0)
    code = np.where(even.any(-1), even.argmax(-1), nearest.argmax(-1))
    return np.copysign(magnitudes[code], values)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), exponent=st.integers(-90, 90))
def test_quantising_rounds_to_nearest_even_with_the_exponent_of_ocp_mx(seed, exponent):
    rng = np.random.default_rng(seed)
    down = rng.normal(size=(1, H, I)) * np.exp2(rng.integers(-4, 5, (1, H, I // 32)) + exponent).repeat(32, -1)
    # Ties, too.
    down[:, ::2] = np.round(down[:, ::2] * 2.0 ** (2 - exponent)) * 2.0 ** (exponent - 2)
    down[0, 5, 32:64] = 0
    down = down.astype(np.float32)
    ones = np.ones((1, I, H), np.float32)
    weights = quantize(ones, ones, down)
    groups = down.astype(np.float64).reshape(1, H, I // 32, 32)
    amax = np.abs(groups).max(-1)
    shared = np.where(amax == 0, 0, np.floor(np.log2(np.where(amax == 0, 1, amax))) - 2)
    np.testing.assert_array_equal(as_bytes(weights.unpack()[3]), shared + 127)
    wanted = round_e2m1(groups / np.exp2(shared)[..., None]) * np.exp2(shared)[..., None]
    np.testing.assert_array_equal(values_of(weights)[1], wanted.reshape(down.shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_or_infinity_makes_its_row_nan(bad):
    rng = np.random.default_rng(0)
    gate, up, down = (rng.normal(size=shape).astype(np.float32) for shape in ((E, I, H), (E, I, H), (E, H, I)))
    up[1, 5, 70] = down[0, 9, 100] = bad
    weights = quantize(gate, up, down)
    rows = weight_layout.unpack_gate_up_row_scale(weights.gate_up_scale)
    assert np.argwhere(np.isnan(rows)).tolist() == [[1, I + 5]]
    rows = weight_layout.unpack_down_row_scale(weights.down_scale)
    assert np.argwhere(np.isnan(rows)).tolist() == [[0, 9]]
    y = np.asarray(mm.moe(jnp.ones((2, H), jnp.bfloat16), weights, jnp.array([[0], [1]]), jnp.ones((2, 1))), np.float32)
    assert np.isnan(y[1]).all() and np.flatnonzero(np.isnan(y[0])).tolist() == [9]
    assert as_bytes(weights.unpack()[1])[1, I + 5, 2] == 255


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("order", ["out_in", "in_out"])
def test_weights_that_spread_too_far_are_refused_or_nan(order, convert):
    gate, up, down = (np.ones(shape, np.float32) for shape in ((E, I, H), (E, I, H), (E, H, I)))
    gate[1, 3, :32] = np.nan  # which may stay
    up[1, 7, 32:64] = 2.0**-27
    if order == "in_out":
        gate, up, down = (array.swapaxes(1, 2) for array in (gate, up, down))
    arguments = [convert(array) for array in (gate, up, down)]
    # 1 is 4 * 2^-2, and 2^-27 is 4 * 2^-29.
    message = "row 7 of expert 1 of up has E8M0 exponents from 98 to 125, wanted at most 26"
    with pytest.raises(ArgumentError, match=message):
        mm.quantize_experts(*arguments, order=order, format="mxfp4")

    traced = jax.jit(lambda *floats: mm.quantize_experts(*floats, order=order, format="mxfp4"))(*arguments)
    rows = weight_layout.unpack_gate_up_row_scale(traced.gate_up_scale)
    assert np.argwhere(np.isnan(rows)).tolist() == [[1, 3], [1, I + 7]]


def test_26_binades_are_quantised():
    gate_up = np.ones((E, 2 * I, H))
    gate_up[..., 32:64] = 2.0**-26
    found, _ = quantized_values(gate_up, np.ones((E, H, I)), np.float32)
    np.testing.assert_array_equal(found, gate_up)
