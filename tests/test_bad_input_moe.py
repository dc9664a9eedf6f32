"""Generated calls of `moe` and `reference.moe` that may be wrong: each is refused in a sentence while tracing, or right."""

import dataclasses
import math
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

import jax_megamoe as mm
from jax_megamoe.weight_layout import LAYOUT_TAGS, Format
from jax_megamoe.weights import DATA_FIELDS
from tests.support import hostile
from tests.support.hostile import Array, array, arrays, cases, has, judge, make_weights, trace

E, H, I = 8, 256, 128
BF16, F32, I32 = ml_dtypes.bfloat16, np.float32, np.int32
FORMATS = get_args(Format)

each_function = pytest.mark.parametrize("moe", [mm.moe, mm.reference.moe], ids=["moe", "reference"])


@st.composite
def weights(draw: st.DrawFn, wrong: float = 0.3) -> tuple[Any, bool]:
    """Weights of any format, stacked or not, and whether all is well with them."""
    format = draw(st.sampled_from(FORMATS))
    layers = draw(st.sampled_from([None, None, 1, 3]))
    right = make_weights(format, (E,) if layers is None else (layers, E), E, H, I)
    if draw(st.floats(0, 1)) >= wrong:
        return right, True
    what = draw(st.sampled_from(["leaf", "leaf", "leaf", "tag", "experts", "held", "hidden", "no layer", "thing"]))
    if what == "leaf":
        name = draw(st.sampled_from(DATA_FIELDS))
        was = getattr(right, name)
        now = draw(arrays(was.shape, was.dtype, wrong=1))
        return dataclasses.replace(right, **{name: now}), has(now, was.shape, was.dtype)
    if what == "tag":
        tag = draw(st.sampled_from(sorted(LAYOUT_TAGS.values())))
        return dataclasses.replace(right, layout=tag), tag == right.layout
    if what == "experts":
        number: Any = draw(st.sampled_from([0, 1, E - 1, E + 1, 2 * E, -E, np.int64(E)]))
        return dataclasses.replace(right, num_experts=number), number == E
    if what == "held":
        held = draw(st.sampled_from([0, 1, E - 1, E + 1]))
        return make_weights(format, (held,) if layers is None else (layers, held), E, H, I), False
    if what == "hidden":
        number = draw(st.sampled_from([0, -1, 1, 128, H + 128, 1 << 17]))
        return dataclasses.replace(right, hidden_size=number), False
    if what == "no layer":
        return make_weights(format, (0, E), E, H, I), False
    return draw(hostile.NOTHING), False


NUMBERS: list[Any] = [
    *(
        0,
        1,
        -1,
        2.5,
        1e-50,
        1e-30,
        1e30,
        1e39,
        1e300,
        10**400,
        10**5000,
        math.nan,
        math.inf,
        -math.inf,
        True,
        "1",
        None,
        1j,
    ),
    *(np.float32(0.5), np.float64(2.0), np.int8(-3), np.True_, np.array(0.25), np.ones(1), np.float32(np.nan)),
]


def as_number(value: Any) -> float | None:
    """A real number known while tracing, rounded to what FP32 can hold; None for what is none."""
    if isinstance(value, np.ndarray | np.generic) and np.shape(value) == ():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int) and abs(value) > 10**300:
        return None
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def is_clamp(value: Any) -> bool:
    number = as_number(value)
    return value is None or (number is not None and number > 0)


def is_factor(value: Any) -> bool:
    number = as_number(value)
    return number is not None and math.isfinite(number)


@st.composite
def activations(draw: st.DrawFn) -> tuple[Any, bool, bool]:
    """An activation, whether it is one, and whether a clamp may stand beside it."""
    kind = draw(st.sampled_from(["none", "none", "swiglu", "situ", "thing"]))
    if kind == "none":
        return None, True, True
    if kind == "thing":
        thing = draw(hostile.NOTHING)
        return thing, thing is None, True
    one, two = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(NUMBERS))
    if kind == "swiglu":
        return mm.SwiGLU(one, two), is_factor(one) and is_factor(two), True
    numbers = as_number(one), as_number(two)
    return mm.SiTU(one, two), all(n is not None and 0.99e-30 < n < 1.01e30 for n in numbers), False


INDICES: list[Any] = [
    *(None, 0, 1, 2, 3, -1, 10**30, 10**5000, -(1 << 31), True, 1.0, "1", np.int64(2), np.uint64((1 << 64) - 1)),
    *(np.array(1, np.int16), np.array([1]), np.array(1.0), np.array(True), np.array((1 << 40) + 1)),
    *(array((), I32), array((), np.uint64), array((), np.bool_), array((1,), I32), array((), F32)),
]


def is_index(value: Any, most: int) -> bool:
    """Whether it is a whole number from 0 to `most`, or an array that is traced, whose value nobody knows."""
    if isinstance(value, Array):
        return value.shape == () and value.dtype.kind in "iu"
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value[()]
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return False
    return 0 <= int(value) <= most


LEADS = [(), (0,), (1,), (4,), (2, 3), (0, 2), (3, 1, 2), ((1 << 31) - 1,), (1 << 20, 1 << 11)]
AXES: list[Any] = [None, "expert", "nowhere", (), ("data", "expert"), ["expert"]]
NO_AXES: list[Any] = [0, 1.5, ("expert", 0), {"expert"}, ("expert", "expert"), b"expert", [None]]


@each_function
@cases(300)
@given(data=st.data())
def test_a_call_is_refused_or_right(moe, data):
    lead, k = data.draw(st.sampled_from(LEADS)), data.draw(st.sampled_from([1, 2, 2, 8, 32, 0, 33, 40]))
    wrong = data.draw(st.sampled_from([0.0, 0.0, 0.2, 0.6]))
    x, ids = data.draw(arrays((*lead, H), BF16, wrong)), data.draw(arrays((*lead, k), I32, wrong))
    topk_weights = data.draw(arrays((*lead, k), F32, wrong))
    held, right = data.draw(weights(wrong))
    options: dict[str, Any] = {}
    right = right and isinstance(x, Array) and x.dtype == BF16 and x.shape[-1:] == (H,)
    right = right and math.prod(x.shape[:-1]) < 1 << 31
    right = right and isinstance(ids, Array) and ids.dtype == I32
    right = right and ids.shape[:-1] == x.shape[:-1] and len(ids.shape) == len(x.shape)
    right = right and 1 <= ids.shape[-1] <= 32 and has(topk_weights, ids.shape, F32)
    right = right and math.prod(ids.shape) < 1 << 31
    layers = held.gate_up.shape[0] if right and len(held.gate_up.shape) == 5 else None
    if data.draw(st.booleans()) and layers is not None:
        options["layer"] = data.draw(st.sampled_from([0, layers - 1, array((), I32), array((), np.uint64)]))
    for name in data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, max_size=3)):
        options[name] = data.draw(OPTIONS[name])
    if "activation" in options:
        options["activation"], is_right, takes_clamp = options["activation"]
        clamp = as_number(options.get("activation_clamp"))
        right &= is_right and (takes_clamp or clamp is None or clamp == math.inf)
    right &= is_clamp(options.get("activation_clamp")) and is_factor(options.get("routed_scaling_factor", 1.0))
    layer, valid = options.get("layer"), options.get("num_valid_tokens")
    right &= layer is None if layers is None else is_index(layer, layers - 1)
    right = right and (valid is None or is_index(valid, x.size // H))
    flag = options.get("return_expert_load", False)
    for given_flag in (flag, options.get("batch_invariant", False)):
        right &= isinstance(given_flag, bool | np.bool_) or (isinstance(given_flag, int) and given_flag in (0, 1))
    right &= options.get("implementation") in (None, "reference", *(["cuda", "collective"] if moe is mm.moe else []))
    right &= all(options.get(name) not in NO_AXES for name in ("expert_axis", "token_axes"))
    event("right" if right else "wrong")
    arguments = {"x": x, "weights": held, "topk_ids": ids, "topk_weights": topk_weights, **options}
    found = judge(lambda: trace(moe, arguments), right)
    if right:
        y, load = found if flag else (found, None)
        assert (y.shape, y.dtype) == (x.shape, BF16)
        assert load is None or (load.shape, load.dtype) == ((E,), I32)


FLAGS = st.sampled_from([True, False, 0, 1, 2, -1, None, "yes", np.True_, 1.5])
OPTIONS: dict[str, Any] = {
    "activation": activations(),
    "activation_clamp": st.sampled_from(NUMBERS),
    "routed_scaling_factor": st.sampled_from(NUMBERS),
    "layer": st.sampled_from(INDICES),
    "num_valid_tokens": st.sampled_from(INDICES),
    "return_expert_load": FLAGS,
    "batch_invariant": FLAGS,
    "implementation": st.sampled_from([None, "cuda", "collective", "reference", "CUDA", "", 0, ("cuda",), b"cuda"]),
    "expert_axis": st.sampled_from(AXES + NO_AXES),
    "token_axes": st.sampled_from(AXES + NO_AXES),
}


@pytest.mark.usefixtures("cuda_core")
@cases(120)
@given(data=st.data())
def test_the_kernel_is_asked_for_what_it_serves(data):
    """Sizes that arrays may have and launches may not: refused while lowering for a GPU, without one."""
    draw, format = data.draw, data.draw(st.sampled_from(FORMATS))
    tokens = draw(st.sampled_from([1, 7, 4096, 1 << 20, (1 << 20) + 1, (1 << 31) - 1, 1 << 31, 1 << 40]))
    experts = draw(st.sampled_from([1, 8, 1023, 1024, 1025, 1 << 20]))
    k, hidden = draw(st.sampled_from([1, 8, 32])), draw(st.sampled_from([128, 256, 65536, 65536 + 128]))
    num_shared = draw(st.sampled_from([0, 0, 1, 32, 33]))
    held = make_weights(format, (experts,), experts, hidden, I)
    arguments = {
        "x": array((tokens, hidden), BF16),
        "weights": held,
        "topk_ids": array((tokens, k), I32),
        "topk_weights": array((tokens, k), F32),
    }
    if num_shared:
        arguments["shared"] = make_weights(format, (num_shared,), num_shared, hidden, I)
    # More slots than 32 together are two calls.
    together = num_shared if k + num_shared <= 32 else 0
    right = tokens <= 1 << 20 and experts + together <= 1024 and hidden <= 65536 and num_shared <= 32
    text = judge(lambda: hostile.lower(mm.moe, arguments), right)
    if right:
        assert text.count("@jax_megamoe.moe.v1(") == (1 if together == num_shared else 2)
