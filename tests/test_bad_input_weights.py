"""Generated arguments of what makes weights: refused in a sentence while tracing, or weights of the right types."""

from typing import Any, get_args

import ml_dtypes
import numpy as np
from hypothesis import event, given
from hypothesis import strategies as st

import jax_megamoe as mm
from jax_megamoe import weight_layout
from jax_megamoe.weight_layout import LEAF_DTYPES, Format
from jax_megamoe.weights import DATA_FIELDS
from tests.support.hostile import (
    NOTHING,
    Array,
    array,
    arrays,
    cases,
    has,
    judge,
    make_weights,
    outcome,
    trace,
    with_leaves,
)

E, H, I = 2, 256, 128
F8, E8M0, F4, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.float4_e2m1fn, ml_dtypes.bfloat16
FLOATS = (BF16, np.float16, np.float32, np.float64)
FORMATS = get_args(Format)
ODD_FLAGS: list[Any] = [None, 2, -1, "yes", 0.0, []]
FLAGS: list[Any] = [True, False, np.True_, 0, 1]


def check_types(weights: Any, format: Format, num_experts: int, hidden: int, inter: int, held: int) -> None:
    assert (weights.format, weights.num_experts) == (format, num_experts)
    assert (weights.hidden_size, weights.intermediate_size) == (hidden, inter)
    shapes = weight_layout.leaf_shapes(format, held, hidden, inter)
    for leaf, shape, dtype in zip(weights.leaves, shapes, LEAF_DTYPES[format], strict=True):
        assert (leaf.shape, leaf.dtype) == (shape, dtype)


def is_size(size: int, pad: bool, format: str) -> bool:
    unit = (32 if format == "mxfp4" else 1) if pad else 128
    return size > 0 and size % unit == 0


def is_count(value: Any, held: int) -> Any:
    if value is None:
        return True
    return (
        isinstance(value, int | np.integer)
        and not isinstance(value, bool)
        and 0 < value < 1 << 31
        and value % held == 0
    )


# Sizes of layers, of which some are no multiples of 128, or of 32.
SIZES = st.sampled_from([(H, I), (H, I), (128, 384), (288, 160), (100, 7), (1, 1), (0, 128), (256, 0)])
COUNTS: list[Any] = [None, None, E, 2 * E, E + 1, 0, -E, True, 2.0, "2", np.int64(E), 10**5000]
BIAS_DTYPE = st.sampled_from([BF16, np.float32, np.float64, np.float16])


@cases(200)
@given(data=st.data())
def test_quantize_experts(data):
    draw = data.draw
    wrong = draw(st.sampled_from([0.0, 0.0, 0.1, 0.4]))
    hidden, inter = draw(SIZES)
    order, format = draw(st.sampled_from(["out_in", "in_out"])), draw(st.sampled_from(FORMATS))
    in_order = (lambda rows, columns: (E, rows, columns)) if order == "out_in" else (lambda r, c: (E, c, r))
    dtype = draw(st.sampled_from(FLOATS))
    gate, up = (draw(arrays(in_order(inter, hidden), dtype, wrong)) for _ in range(2))
    down = draw(arrays(in_order(hidden, inter), dtype, wrong))
    options: dict[str, Any] = {"order": order, "format": format, "pad": draw(st.sampled_from(FLAGS))}
    if draw(st.booleans()):
        options["gate_up_bias"] = draw(arrays((E, 2 * inter), draw(BIAS_DTYPE), wrong))
    if draw(st.booleans()):
        options["down_bias"] = draw(arrays((E, hidden), draw(BIAS_DTYPE), wrong))
    options["num_experts"] = draw(st.sampled_from(COUNTS))
    right = all(isinstance(a, Array) and a.dtype in FLOATS for a in (gate, up, down))
    # Other sizes that fit each other make a layer of their own.
    right = right and len(gate.shape) == 3 and gate.shape[0] > 0 and gate.shape == up.shape
    right = right and down.shape == (gate.shape[0], gate.shape[2], gate.shape[1])
    if right:
        held, *rest = gate.shape
        inter, hidden = rest if order == "out_in" else rest[::-1]
        right = is_size(hidden, bool(options["pad"]), format) and is_size(inter, bool(options["pad"]), format)
        for name, shape in (("gate_up_bias", (held, 2 * inter)), ("down_bias", (held, hidden))):
            bias = options.get(name)
            right &= bias is None or (
                isinstance(bias, Array) and bias.shape == shape and bias.dtype in FLOATS and format != "fp8_block"
            )
        right &= is_count(options["num_experts"], held)
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from(["order", "format", "pad", "progress"]))
        odd = {"pad": ODD_FLAGS, "progress": [0, "x", True]}.get(name, ["fp8", "", None, 0, ["mxfp4"], b"mxfp4"])
        options[name], right = draw(st.sampled_from(odd)), False
    event("right" if right else "wrong")
    arguments = {"gate": gate, "up": up, "down": down, **options}
    if right and max(held * hidden * inter, *(a.size if a.is_numpy else 0 for a in (gate, up, down))) > 1 << 22:
        return  # large ones of NumPy are computed on their way to the device
    if right and all(a.is_numpy for a in (gate, up, down)):
        arguments["up"] = array(up.shape, up.dtype)
    found = judge(lambda: trace(mm.quantize_experts, arguments), right)
    if right:
        number = options["num_experts"]
        check_types(found, format, held if number is None else number, hidden, inter, held)


def natural(format: str, e: int, hidden: int, inter: int) -> dict[str, list[tuple[tuple[int, ...], Any]]]:
    """The arguments of `pack_experts`, in all the forms that a format has."""
    if format == "mxfp4":
        scales = [(gate_up, t) for gate_up in ((e, 2 * inter, hidden // 32),) for t in (E8M0, np.uint8)]
        down_scales = [((e, hidden, inter // 32), t) for t in (E8M0, np.uint8)]
        codes = (np.uint8, np.int8)
        return {
            "gate_up": [((e, 2 * inter, hidden // 2), t) for t in codes] + [((e, 2 * inter, hidden), F4)],
            "gate_up_scale": scales,
            "down": [((e, hidden, inter // 2), t) for t in codes] + [((e, hidden, inter), F4)],
            "down_scale": down_scales,
        }
    blocks = lambda size: -(-size // 128)  # noqa: E731
    if format == "fp8_block":
        gate_up_shapes, down_shapes = [(e, 2 * blocks(inter), blocks(hidden))], [(e, blocks(hidden), blocks(inter))]
        dtypes: tuple[Any, ...] = (np.float32, BF16, E8M0, np.uint8)
    else:
        gate_up_shapes = [(e, 2 * inter), (e, 2 * inter, 1), (e, 2), (e,)]  # type: ignore[list-item]
        down_shapes, dtypes = [(e, hidden), (e, hidden, 1), (e,)], (np.float32, BF16)  # type: ignore[list-item]
    return {
        "gate_up": [((e, 2 * inter, hidden), F8)],
        "gate_up_scale": [(shape, t) for shape in gate_up_shapes for t in dtypes],
        "down": [((e, hidden, inter), F8)],
        "down_scale": [(shape, t) for shape in down_shapes for t in dtypes],
    }


def one_of(forms: list[tuple[tuple[int, ...], Any]], wrong: float) -> st.SearchStrategy[Any]:
    return st.sampled_from(forms).flatmap(lambda form: arrays(form[0], form[1], wrong))


@cases(250)
@given(data=st.data())
def test_pack_experts(data):
    draw = data.draw
    wrong = draw(st.sampled_from([0.0, 0.0, 0.15, 0.5]))
    # Of one row and one column, a scale of a block and one of a row have the same shape.
    format, (hidden, inter) = draw(st.sampled_from(FORMATS)), draw(SIZES.filter(lambda sizes: sizes != (1, 1)))
    forms = natural(format, E, hidden, inter)
    arguments: dict[str, Any] = {n: draw(one_of(f, wrong)) for n, f in forms.items()}
    if draw(st.integers(0, 9)) == 0:  # one of another format
        name = draw(st.sampled_from(sorted(forms)))
        other = natural(draw(st.sampled_from(FORMATS)), E, hidden, inter)
        arguments[name] = draw(one_of(other[name], 0))
    pad, number = draw(st.sampled_from(FLAGS)), draw(st.sampled_from(COUNTS))
    right = is_size(hidden, bool(pad), format) and is_size(inter, bool(pad), format) and is_count(number, E)
    # Of other sizes, or of another format altogether, what comes of it has to be what its parts say.
    as_drawn = all(any(has(arguments[n], *form) for form in f) for n, f in forms.items())
    biases = {"gate_up_bias": (E, 2 * inter), "down_bias": (E, hidden)}
    for name, shape in biases.items():
        if draw(st.integers(0, 3)) == 0:
            bias = arguments[name] = draw(arrays(shape, draw(BIAS_DTYPE), wrong))
            is_bias = isinstance(bias, Array) and bias.shape == shape and bias.dtype in FLOATS
            right &= bias is None or (is_bias and format != "fp8_block")
    # Whole numbers look like exponents only from 64 on: ones are scales.
    arguments |= {"pad": pad, "num_experts": number}
    event(f"right {right}, as drawn {as_drawn}")
    if as_drawn:
        found = judge(lambda: trace(mm.pack_experts, arguments), right)
        if right:
            check_types(found, format, E if number is None else int(number), hidden, inter, E)
    elif (found := outcome(lambda: trace(mm.pack_experts, arguments))) is not None:
        held, hidden, inter = found.leaves.gate_up.shape[0], found.hidden_size, found.intermediate_size
        forms = natural(found.format, held, hidden, inter)
        assert all(any(has(arguments[name], *form) for form in f) for name, f in forms.items())
        check_types(found, found.format, held if number is None else int(number), hidden, inter, held)


def packed(format: Format, lead: tuple[int, ...] = (E,)) -> mm.ExpertWeights:
    return make_weights(format, lead, E, H, I)


@cases(60)
@given(data=st.data())
def test_packing_twice_is_refused(data):
    format, maker = data.draw(st.sampled_from(FORMATS)), data.draw(st.sampled_from(["pack", "quantize"]))
    weights, function = packed(format), mm.pack_experts if maker == "pack" else mm.quantize_experts
    names = ["gate_up", "gate_up_scale", "down", "down_scale"] if maker == "pack" else ["gate", "up", "down"]
    leaves = weights.leaves[: len(names)]
    arguments: dict[str, Any] = dict(zip(names, leaves, strict=True))
    if data.draw(st.booleans()):
        arguments[data.draw(st.sampled_from(names))] = weights
    judge(lambda: trace(function, {**arguments, "pad": data.draw(st.booleans())}), is_right=False)


@cases(100)
@given(data=st.data())
def test_stack_experts(data):
    draw = data.draw
    kind = st.sampled_from(["right", "right", "right", "right", "format", "stacked", "experts", "thing"])
    kinds = draw(st.lists(kind, max_size=4))
    format: Format = draw(st.sampled_from(FORMATS))
    other: Format = draw(st.sampled_from([f for f in FORMATS if f != format]))
    of_kind = {"right": packed(format), "format": packed(other), "stacked": packed(format, (3, E))}
    of_kind["experts"] = packed(format, (E + 1,))
    thing = draw(NOTHING)
    layers = [of_kind.get(kind, thing) for kind in kinds]
    number = draw(st.sampled_from([None, None, len(kinds), len(kinds) + 1, 0, -1, True, 1.0, "1", 10**5000]))
    is_number = number is None or (isinstance(number, int) and number is not True and number == len(kinds))
    # One layer that is like no other is alone in its right.
    is_uniform = len(set(kinds)) == 1 and kinds[0] not in ("stacked", "thing")
    found = judge(lambda: trace(mm.stack_experts, {"weights": layers, "num_layers": number}), is_uniform and is_number)
    if found is not None:
        assert found.gate_up.shape == (len(kinds), *layers[0].gate_up.shape)


IDS: list[Any] = [
    *(array((3,), t) for t in (np.int8, np.int32, np.uint64, np.float32, np.bool_)),
    *(array(shape, np.int32) for shape in ((), (0,), (1,), (3, 4), (1, 4), (2, 4), (3, 0))),
    *(np.array(ids) for ids in ([0, 1, 1], [0, E], [-1], [], [(1 << 32)], [[0, 1]] * 3, [[0], [1], [E]], 0, [0.0])),
    *(np.array([0, 1], np.uint8), np.array([True]), [0, 1], None, "0", 0),
]


@cases(100)
@given(data=st.data())
def test_take_experts(data):
    format: Format = data.draw(st.sampled_from(FORMATS))
    layers, ids = data.draw(st.sampled_from([None, 3])), data.draw(st.sampled_from(IDS))
    weights = packed(format, (E,) if layers is None else (layers, E))
    shapes = [1] if layers is None else [1, 2]
    right = isinstance(ids, Array | np.ndarray) and ids.dtype.kind in "iu" and ids.size > 0
    right = right and len(ids.shape) in shapes and (len(ids.shape) == 1 or ids.shape[0] == layers)
    right = right and (isinstance(ids, Array) or ((ids >= 0) & (ids < E)).all())
    if data.draw(st.integers(0, 4)) == 0:
        thing = data.draw(NOTHING)
        judge(lambda: trace(mm.take_experts, {"weights": thing, "expert_ids": ids}), is_right=False)
        return
    found = judge(lambda: trace(mm.take_experts, {"weights": weights, "expert_ids": ids}), bool(right))
    if right:
        assert found.num_experts == ids.shape[-1] == found.gate_up.shape[-4]
        assert found.format == format and found.num_layers == layers


HEADERS = [
    b"",
    b"{}",
    b"[1]",
    b"\xff",
    b'{"num_experts": 2}',
    b"null",
    b"1" * 5000,
    b"[" * 100_000,
    b"[" + b"[]," * 10_000 + b"1]",
]


@cases(150)
@given(data=st.data())
def test_from_arrays(data):
    draw, format = data.draw, data.draw(st.sampled_from(FORMATS))
    shapes, fields = weight_layout.leaf_shapes(format, 1, 128, 128), ["num_experts", "hidden_size", "intermediate_size"]
    leaves = [np.ones(shape, dtype) for shape, dtype in zip(shapes, LEAF_DTYPES[format], strict=True)]
    saved: Any = with_leaves(leaves, format, 1, 128, 128).to_arrays()
    what = draw(st.sampled_from(["nothing", "header", "field", "leaf", "missing", "thing"]))
    if what == "header":
        saved["header"] = np.frombuffer(draw(st.sampled_from(HEADERS) | st.binary(max_size=80)), np.uint8)
    elif what == "field":
        value = draw(
            st.sampled_from(["0", "-1", "1e3", "1.5", "true", "null", '"1"', "[]", "9" * 30, "9" * 5000, "129"])
        )
        text = bytes(saved["header"]).decode()
        field = draw(st.sampled_from(fields))
        begin = text.index(field) + len(field) + 3
        end = next(i for i in range(begin, len(text)) if text[i] in ",}")
        saved["header"] = np.frombuffer((text[:begin] + value + text[end:]).encode(), np.uint8)
    elif what == "leaf":
        name = draw(st.sampled_from(DATA_FIELDS))
        changed = draw(arrays(saved[name].shape, saved[name].dtype, wrong=1))
        if isinstance(changed, Array):
            changed = np.zeros(changed.shape if changed.size < 1 << 16 else (1,), changed.dtype)
        saved[name] = changed
    elif what == "missing":
        del saved[draw(st.sampled_from(sorted(saved)))]
    elif what == "thing":
        name = draw(st.sampled_from([*sorted(saved), "all"]))
        thing = draw(NOTHING)
        saved = thing if name == "all" else {**saved, name: thing}
    found = outcome(lambda: mm.ExpertWeights.from_arrays(saved))
    assert found is not None or what != "nothing"
    if found is not None:
        held = found.leaves.gate_up.shape[-4]
        check_types(found, found.format, found.num_experts, found.hidden_size, found.intermediate_size, held)
