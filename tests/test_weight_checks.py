"""What cannot be weights is refused by name, and the advice is right."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_megamoe as mm
from jax_megamoe.errors import DTypeError, LayoutError, MegaMoEError, ShapeError
from tests.support import numpy_model
from tests.support.cases import one_in

E, H, I = 2, 256, 384
QUANTIZE = "dequantise the weights, .* quantize_experts"


def f8(*shape: int) -> np.ndarray:
    return np.ones(shape, ml_dtypes.float8_e4m3fn)


def blocks(**replaced: object) -> dict[str, Any]:
    scales = {"gate_up_scale": np.ones((E, 6, 2), np.float32), "down_scale": np.ones((E, 2, 3), np.float32)}
    return {"gate_up": f8(E, 2 * I, H), "down": f8(E, H, I), **scales, **replaced}


def refuse(error: type[MegaMoEError], message: str, **replaced: object) -> str:
    with pytest.raises(error, match=message) as caught:
        mm.pack_experts(**blocks(**replaced))
    return str(caught.value)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), as_bytes=st.booleans(), on_device=st.booleans())
def test_e8m0_scales_are_powers_of_two(seed, as_bytes, on_device):
    rng = np.random.default_rng(seed)
    exponents = {"gate_up_scale": rng.integers(0, 256, (E, 6, 2)), "down_scale": rng.integers(0, 256, (E, 2, 3))}
    scales = {name: value.astype(np.uint8) for name, value in exponents.items()}
    if not as_bytes:
        scales = {name: value.view(ml_dtypes.float8_e8m0fnu) for name, value in scales.items()}
    if on_device:
        scales = jax.tree.map(jnp.asarray, scales)
    _, gate_up_scale, _, down_scale = mm.pack_experts(**blocks(**scales)).unpack()
    for name, found in (("gate_up_scale", gate_up_scale), ("down_scale", down_scale)):
        wanted = np.where(exponents[name] == 255, np.nan, 2.0 ** (exponents[name] - 127.0)).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(found), wanted)


def test_e8m0_scales_give_the_layer_that_their_floats_give():
    rng = np.random.default_rng(0)
    gate_up = numpy_model.round_e4m3(rng.normal(size=(E, 2 * I, H)))
    down = numpy_model.round_e4m3(rng.normal(size=(E, H, I)))
    exponents = rng.integers(117, 125, (E, 6, 2)).astype(np.uint8), rng.integers(117, 125, (E, 2, 3)).astype(np.uint8)
    floats = [np.exp2(value - np.float32(127)) for value in exponents]
    as_bytes = mm.pack_experts(gate_up, exponents[0], down, exponents[1])
    as_floats = mm.pack_experts(gate_up, floats[0], down, floats[1])
    x, ids, topk_weights = jnp.ones((3, H), jnp.bfloat16), jnp.array([[0], [1], [0]]), jnp.ones((3, 1))
    np.testing.assert_array_equal(mm.moe(x, as_bytes, ids, topk_weights), mm.moe(x, as_floats, ids, topk_weights))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_exponents_cast_to_floats_are_refused(dtype, convert):
    exponents = convert(np.random.default_rng(0).integers(117, 125, (E, 2, 3)).astype(dtype))
    refuse(
        DTypeError,
        "down_scale holds whole numbers from 117 to 124.*as float8_e8m0fnu, or as uint8",
        down_scale=exponents,
    )


@pytest.mark.parametrize("scale", [1.0, 64.0, 128.0, 100.5, 300.0, 0.0])
def test_large_scales_are_scales(scale):
    scales = np.full((E, 2, 3), scale, np.float32)
    np.testing.assert_array_equal(mm.pack_experts(**blocks(down_scale=scales)).unpack()[3], scales)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (np.int32, "pass the scales as the checkpoint holds them, not packed"),
        (np.uint32, "pass the scales as the checkpoint holds them, not packed"),
        (np.int8, "bytes of E8M0, pass them as uint8"),
        (np.float16, "cast it to float32"),
        (np.float64, "cast it to float32"),
        (ml_dtypes.float8_e4m3fn, QUANTIZE),
    ],
)
def test_other_types_of_scales(dtype, advice):
    message = refuse(
        DTypeError, f"down_scale has dtype {np.dtype(dtype).name}, .*{advice}", down_scale=np.ones((E, 2, 3), dtype)
    )
    assert ("cast" in message) == (dtype in (np.float16, np.float64))


@pytest.mark.parametrize("name", ["float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e4m3b11fnuz", "int4"])
def test_other_types_of_weights_are_to_be_dequantised(name):
    message = refuse(
        DTypeError,
        f"down has dtype {name}, wanted float8_e4m3fn, or mxfp4 as uint8, int8 or float4_e2m1fn: {QUANTIZE}",
        down=np.zeros((E, H, I), name),
    )
    assert "view" not in message
    floats = np.zeros((E, I, H), name)
    with pytest.raises(DTypeError, match=f"gate has dtype {name}, .*{QUANTIZE}"):
        mm.quantize_experts(floats, floats, np.zeros((E, H, I), name))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_bytes_may_be_e4m3_only_at_full_width(dtype):
    full = refuse(
        DTypeError,
        f"gate_up has dtype .*only if its bytes are those of float8_e4m3fn.*{QUANTIZE}",
        gate_up=np.zeros((E, 2 * I, H), dtype),
    )
    assert ".view(jax.numpy.float8_e4m3fn)" in full
    packed = {"gate_up": np.zeros((E, 2 * I, H // 2), dtype), "down": np.zeros((E, H, I // 2), dtype)}
    for name, value in packed.items():
        message = refuse(DTypeError, f"wanted one format, FP8 or mxfp4, for both: {QUANTIZE}", **{name: value})
        assert f"{name} has dtype {np.dtype(dtype).name}" in message.replace("and down", "and down has dtype")
    refuse(
        DTypeError, "gate_up_scale has dtype float32, wanted E8M0 for mxfp4, as float8_e8m0fnu or .* uint8", **packed
    )


@pytest.mark.parametrize(
    ("replaced", "advice"),
    [
        (
            {"gate_up_scale": (E, 2 * I)},
            rf"gate_up_scale has shape .*, of fp8_channel and down_scale .*, of fp8_block, wanted one .*{QUANTIZE}",
        ),
        ({"down_scale": (E, H, 1)}, f"down_scale has shape .*, of fp8_channel, wanted one format: {QUANTIZE}"),
        ({"down_scale": (E, H, I // 32)}, f"scales of other blocks are another format, {QUANTIZE}"),
        ({"gate_up_scale": (E,)}, "gate_up_scale has shape .*, of fp8_channel and .*, of fp8_block, wanted one format"),
        ({"down_scale": ()}, r"for a scale of a whole matrix pass one for each expert, \[E\]"),
        ({"down_scale": (E, 3, 2)}, "swap its last two dimensions"),
        (
            {"gate_up": (E, H, 2 * I)},
            r"gate_up is \[E, 2I, H\], gate rows first, and down is \[E, H, I\]; swap its last two",
        ),
    ],
)
def test_other_shapes(replaced, advice):
    arrays = {
        name: np.ones(shape, np.float32 if "scale" in name else ml_dtypes.float8_e4m3fn)
        for name, shape in replaced.items()
    }
    refuse(ShapeError, advice, **arrays)


def floats() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in (("gate", (E, I, H)), ("up", (E, I, H)), ("down", (E, H, I)))
    }


@pytest.mark.parametrize("format", ["fp8_block", "fp8_channel", "mxfp4"])
def test_sizes_beyond_what_int32_counts(format):
    size = (1 << 33) + 32
    matrices = [np.broadcast_to(np.float32(1), shape) for shape in ((1, size, H), (1, size, H), (1, H, size))]
    with pytest.raises(ShapeError, match=rf"intermediate size I is {size}, wanted at most 2\^29"):
        mm.quantize_experts(*matrices, format=format, pad=True)
    codes = [np.broadcast_to(np.uint8(1), shape) for shape in ((1, 2 * size, H // 2), (1, H, size // 2))]
    exponents = [np.broadcast_to(np.uint8(127), shape) for shape in ((1, 2 * size, H // 32), (1, H, size // 32))]
    with pytest.raises(ShapeError, match=rf"intermediate size I is {size}, wanted at most 2\^29"):
        mm.pack_experts(codes[0], exponents[0], codes[1], exponents[1], pad=True)


@pytest.mark.parametrize(
    ("convert", "dtype"),
    one_in(2, {"numpy": np.asarray, "jax": jnp.asarray}, {"float32": jnp.float32, "bfloat16": jnp.bfloat16}),
)
def test_order_in_out_takes_the_matrices_transposed(convert, dtype):
    out_in: dict[str, Any] = {name: value.astype(dtype) for name, value in floats().items()}
    in_out: dict[str, Any] = {name: convert(value.swapaxes(1, 2)) for name, value in out_in.items()}
    found, wanted = mm.quantize_experts(**in_out, order="in_out"), mm.quantize_experts(**out_in)
    assert (found.hidden_size, found.intermediate_size) == (H, I)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("order", ["out_in", "in_out"])
@pytest.mark.parametrize("name", ["up", "down"])
def test_one_transposed_matrix_is_refused_with_the_layout(order, name):
    arrays: dict[str, Any] = floats()
    if order == "in_out":
        arrays = {name: value.swapaxes(1, 2) for name, value in arrays.items()}
    arrays[name] = arrays[name].swapaxes(1, 2)
    gate, down = (r"\[E, I, H\]", r"\[E, H, I\]") if order == "out_in" else (r"\[E, H, I\]", r"\[E, I, H\]")
    message = f"{name} has shape .*with order='{order}' gate and up are {gate} and down is {down}; swap its last two"
    with pytest.raises(ShapeError, match=message):
        mm.quantize_experts(**arrays, order=order)


def test_other_orders_and_no_experts():
    with pytest.raises(LayoutError, match="order is 'EHI', wanted one of .*out_in.*in_out"):
        mm.quantize_experts(**floats(), order="EHI")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"gate has shape \(0, 384, 256\), wanted \[E, I, H\].*at least one"):
        mm.quantize_experts(**{name: value[:0] for name, value in floats().items()})
    with pytest.raises(ShapeError, match="hidden size H is 192, wanted a positive multiple of 128: pass pad=True"):
        mm.quantize_experts(np.ones((E, I, 192)), np.ones((E, I, 192)), np.ones((E, 192, I)))


@pytest.mark.parametrize("num_experts", [0, -2, 3, 1, 2.0, True, "2"])
def test_numbers_of_experts_that_cannot_be(num_experts):
    with pytest.raises(ShapeError, match=f"num_experts is {num_experts!r}, wanted a"):
        mm.quantize_experts(**floats(), num_experts=num_experts)
    with pytest.raises(ShapeError, match=f"num_experts is {num_experts!r}, wanted a"):
        mm.pack_experts(**blocks(), num_experts=num_experts)
