"""Generated values that are no good: results are those of the NumPy model, and nothing crosses between tokens."""

import functools
from typing import Any, get_args

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

import jax_megamoe as mm
from jax_megamoe.weight_layout import Format
from tests.support import numpy_model
from tests.support.compare import bits, difference
from tests.support.hostile import cases, judge

# A program for each format, whatever the values are.
T, K, E, H, I = 6, 3, 4, 256, 128
INT32 = np.iinfo(np.int32)
FORMATS = get_args(Format)
TINY = 1e-30  # below which FP32 may be subnormal on the way, which is taken for zero or not
TOLERANCE = 1e-6  # of a token: FP8 values that the order of sums moves across a rounding boundary

X_VALUES = [0.0, -0.0, 1e-40, 1e-5, 1e12, np.nan, np.inf, -np.inf]
WEIGHTS = [0.0, -1.0, 1e-42, 1e10, np.nan, np.inf, -np.inf]
IDS = [-1, E, E + 1, INT32.min, INT32.max, INT32.min + 1, -E]


@functools.cache
def program(format: Format) -> Any:
    return jax.jit(functools.partial(mm.moe, return_expert_load=True))


@functools.cache
def natural(format: Format) -> numpy_model.Experts:
    random = np.random.default_rng(0)
    gate_up, down = (random.standard_normal(shape) / 8 for shape in ((E, 2 * I, H), (E, H, I)))
    if format == "mxfp4":
        codes = [random.integers(0, 256, (*a.shape[:2], a.shape[2] // 2), np.uint8) for a in (gate_up, down)]
        exponents = [
            random.integers(119, 123, (*a.shape[:2], a.shape[2] // 32)).astype(np.uint8) for a in (gate_up, down)
        ]
        return numpy_model.Experts(codes[0], exponents[0], codes[1], exponents[1])
    values = [numpy_model.round_e4m3(a * 64) for a in (gate_up, down)]
    shapes = [(E, 2, 2), (E, 2, 1)] if format == "fp8_block" else [(E, 2 * I), (E, H)]
    scales = [random.uniform(0.01, 0.02, shape).astype(np.float32) for shape in shapes]
    return numpy_model.Experts(values[0], scales[0], values[1], scales[1])


@functools.cache
def packed(format: Format) -> mm.ExpertWeights:
    return mm.pack_experts(*natural(format))


def clean(seed: int) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((T, H)).astype(numpy_model.BF16)
    return x, random.integers(0, E, (T, K)).astype(np.int32), random.random((T, K), np.float32) + 0.1


@functools.cache
def clean_result(format: Format) -> np.ndarray[Any, Any]:
    x, ids, topk_weights = clean(0)
    return bits(program(format)(x, packed(format), ids, topk_weights)[0])


def assert_as_model(y: Any, wanted: Any) -> None:
    """Token by token: what is no finite number where the model has such, and the other numbers."""
    for row, model in zip(np.asarray(y).astype(np.float64), wanted.astype(np.float64), strict=True):
        # Which of NaN and infinity it is depends on where an infinite scale meets a zero: before the sum, or after it.
        np.testing.assert_array_equal(np.isfinite(row), np.isfinite(model))
        finite = np.isfinite(model) & (np.maximum(abs(row), abs(model)) > TINY)
        assert difference(row[finite], model[finite]) < TOLERANCE


@cases(60)
@given(data=st.data())
def test_values_of_tokens(data):
    draw, format = data.draw, data.draw(st.sampled_from(FORMATS))
    x, ids, topk_weights = clean(draw(st.integers(0, 9)))
    before, _ = program(format)(x, packed(format), ids, topk_weights)
    hit = set()
    for _ in range(draw(st.integers(1, 4))):
        token, what = draw(st.integers(0, T - 1)), draw(st.sampled_from(["some", "all", "weight", "zeros"]))
        hit.add(token)
        if what == "weight":
            topk_weights[token, draw(st.integers(0, K - 1))] = draw(st.sampled_from(WEIGHTS))
        elif what == "zeros":
            x[token] = 0
        else:
            columns = slice(None) if what == "all" else draw(st.integers(0, H - 1))
            x[token, columns] = draw(st.sampled_from(X_VALUES))
    y, _ = program(format)(x, packed(format), ids, topk_weights)
    untouched = [token for token in range(T) if token not in hit]
    np.testing.assert_array_equal(bits(y)[untouched], bits(before)[untouched])
    # Which experts the tokens have is another question.
    for token in hit:
        ids[token, draw(st.integers(0, K - 1))] = draw(st.sampled_from(IDS))
    function = draw(st.sampled_from([program(format), functools.partial(mm.reference.moe, return_expert_load=True)]))
    y, load = function(x, packed(format), ids, topk_weights)
    with np.errstate(all="ignore"):
        wanted, wanted_load = numpy_model.moe(x, natural(format), ids, topk_weights)
    event(f"nan: {np.isnan(wanted.astype(np.float32)).any()}")
    assert_as_model(y, wanted)
    np.testing.assert_array_equal(load, wanted_load)
    # The next correct call is right.
    x, ids, topk_weights = clean(0)
    np.testing.assert_array_equal(bits(program(format)(x, packed(format), ids, topk_weights)[0]), clean_result(format))


SCALES = [0.0, -0.0, -0.01, 1e-40, 1e-20, 1e10, np.nan, np.inf, -np.inf]


@cases(40)
@given(data=st.data())
def test_values_of_weights(data):
    draw, format = data.draw, data.draw(st.sampled_from(FORMATS))
    experts = numpy_model.Experts(*(array.copy() for array in natural(format)))
    right = True
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(["gate_up", "gate_up_scale", "down", "down_scale"]))
        array = getattr(experts, name)
        index = tuple(draw(st.integers(0, size - 1)) for size in array.shape)
        if name.endswith("scale"):
            value: Any = draw(st.sampled_from([0, 1, 90, 130, 140, 254, 255] if format == "mxfp4" else SCALES))
            array[index] = value
        else:
            array.view(np.uint8)[index] = draw(st.integers(0, 255))  # NaN of FP8 among them
    if format == "mxfp4":
        rows = [(s.astype(int), v.reshape(*s.shape, -1)) for v, s in (experts[:2], experts[2:])]
        for exponents, codes in rows:
            used = (codes & 0x77).any(-1)  # a group of zeros counts for nothing
            low = np.where(used, exponents, 999).min(-1)
            right &= not (exponents == 255).any() and bool((np.where(used, exponents, -999).max(-1) - low <= 26).all())
    event("right" if right else "wrong")
    weights = judge(lambda: mm.pack_experts(*experts), right)
    if weights is None:
        return
    for array, back in zip(experts, weights.unpack(), strict=True):
        np.testing.assert_array_equal(np.asarray(back).view(np.uint8), array.view(np.uint8))
    x, ids, topk_weights = clean(1)
    y, _ = program(format)(x, weights, ids, topk_weights)
    with np.errstate(all="ignore"):
        wanted, _ = numpy_model.moe(x, experts, ids, topk_weights)
    assert_as_model(y, wanted)


@pytest.mark.parametrize("format", FORMATS)
def test_one_program_serves_all_values(format):
    """What the tests above rely on, to be fast."""
    packed_weights, compiled = packed(format), program(format)
    for seed in range(3):
        x, ids, topk_weights = clean(seed)
        compiled(x, packed_weights, ids, topk_weights)
    assert compiled._cache_size() <= len(FORMATS)
    assert ml_dtypes.finfo(numpy_model.BF16).bits == 16
