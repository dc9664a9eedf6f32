"""Bad input for the public functions: strategies of arguments, and the judge of what comes of them.

What a test generates is a call with one or several arguments that may be wrong. Whether they are is decided in the
test, apart from the package: a call is refused where it should be, with a sentence, and nothing else happens.

MEGAMOE_BAD_INPUT_CASES is how many cases each test has; without it they are few, and the same in every run. With it,
`--hypothesis-seed=N` chooses them, and a run without that option draws a seed and says it.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import jax_megamoe as mm
from jax_megamoe import weight_layout
from jax_megamoe.errors import MegaMoEError
from jax_megamoe.weight_layout import Format
from jax_megamoe.weights import DATA_FIELDS

_MANY = os.environ.get("MEGAMOE_BAD_INPUT_CASES")


def cases(few: int) -> settings:
    """How often a test runs: `few` times, or as often as the environment says."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    checks.append(HealthCheck.function_scoped_fixture)  # none of them is changed
    # Explaining a failure takes far longer than finding it.
    phases = [phase for phase in Phase if phase is not Phase.explain]
    options: Any = {"deadline": None, "phases": phases, "suppress_health_check": checks, "print_blob": True}
    if _MANY is None:
        return settings(max_examples=few, derandomize=True, database=None, **options)
    return settings(max_examples=int(_MANY), **options)


class Unusual:
    """An object of a class that nobody has heard of."""

    def __repr__(self) -> str:
        raise RuntimeError("not today")


def things() -> list[Any]:
    """What is no array of numbers."""
    return [
        None,
        "x",
        b"x",
        "x\n" * 1000,
        3.5,
        [1.0, 2.0],
        (),
        {},
        {"x": 1},
        Unusual(),
        Unusual,
        len,
        10**5000,
        np.array(["a", "b"]),
        np.array([None, 1], object),
        np.array(["2026-01-01"], "datetime64[D]"),
        np.zeros(2, [("a", np.int32)]),
        np.ma.masked_array([1.0, 2.0], [True, False]),
        np.zeros(2, np.longdouble),
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, 2), jnp.float32),
    ]


_THINGS = things()
# By number: some of them have no text, which hypothesis asks for. The first one is None.
NOTHING = st.integers(0, len(_THINGS) - 1).map(lambda number: _THINGS[number])
BUT_NONE = st.integers(1, len(_THINGS) - 1).map(lambda number: _THINGS[number])

DTYPES: list[Any] = [
    np.bool_,
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, np.float32, np.float64, np.complex64, ml_dtypes.bfloat16),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e8m0fnu),
    *(ml_dtypes.float4_e2m1fn, ml_dtypes.int4, ml_dtypes.uint4),
]


@dataclasses.dataclass(frozen=True, repr=False)
class Array:
    """An argument to be: traced, or ones of NumPy, which take no memory."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_numpy: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def has(self, shape: tuple[int, ...], dtype: Any) -> bool:
        return self.shape == shape and self.dtype == dtype

    def __repr__(self) -> str:
        return f"{'numpy ' if self.is_numpy else ''}{self.dtype.name}{list(self.shape)}"


def array(shape: tuple[int, ...], dtype: Any, is_numpy: bool = False) -> Array:
    return Array(shape, np.dtype(dtype), is_numpy)


def make_weights(format: Format, lead: tuple[int, ...], num_experts: int, hidden: int, inter: int) -> mm.ExpertWeights:
    """Weights of such arrays, whose leading sizes are `lead`."""
    shapes, dtypes = weight_layout.leaf_shapes(format, 1, hidden, inter), weight_layout.LEAF_DTYPES[format]
    leaves: Any = [array((*lead, *shape[1:]), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return with_leaves(leaves, format, num_experts, hidden, inter)


def with_leaves(leaves: Any, format: Format, num_experts: int, hidden: int, inter: int) -> mm.ExpertWeights:
    sizes: Any = {"num_experts": num_experts, "hidden_size": hidden, "intermediate_size": inter}
    by_name = dict(zip(DATA_FIELDS, leaves, strict=True))
    return mm.ExpertWeights(**by_name, **sizes, layout=weight_layout.LAYOUT_TAGS[format])


@st.composite
def shapes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape than this one, most times; of the same number of elements, or of far more, too."""
    changed = list(shape)
    place = draw(st.integers(0, max(0, len(shape) - 1)))
    what = draw(st.sampled_from(["size", "more", "less", "swap", "flat", "scalar", "huge"]))
    if what == "size" and changed:
        changed[place] = draw(
            st.sampled_from([0, 1, changed[place] + 1, max(0, changed[place] - 1), 2 * changed[place]])
        )
    elif what == "more":
        changed.insert(place, draw(st.sampled_from([1, 2])))
    elif what == "less" and changed:
        del changed[place]
    elif what == "swap" and len(changed) > 1:
        changed[-1], changed[-2] = changed[-2], changed[-1]
    elif what == "flat":
        changed = [int(np.prod(shape))]
    elif what == "scalar":
        changed = []
    elif what == "huge" and changed:
        changed[place] = draw(st.sampled_from([1 << 20, 1 << 31, (1 << 40) + 1]))
    return tuple(changed)


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...], dtype: Any, wrong: float = 0.25) -> Any:
    """An array of this shape and dtype; in so many of all cases, something else in its place."""
    is_numpy = draw(st.sampled_from([False, False, True])) and math.prod(shape) < 1 << 20
    if draw(st.floats(0, 1)) >= wrong:
        return array(shape, dtype, is_numpy)
    what = draw(st.sampled_from(["shape", "dtype", "both", "thing", "dtype"]))
    if what == "thing":
        return draw(NOTHING)
    shape = draw(shapes(shape)) if what in ("shape", "both") else shape
    dtype = draw(st.sampled_from(DTYPES)) if what in ("dtype", "both") else dtype
    return array(shape, dtype, is_numpy and math.prod(shape) < 1 << 20)


def has(value: Any, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether it is an array of this shape and dtype."""
    return isinstance(value, Array) and value.has(shape, dtype)


def trace(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The types of what the function returns for these arguments."""
    # Else JAX makes of 64 bits 32, and of a wrong dtype a right one.
    with jax.enable_x64(True):
        return jax.eval_shape(*_traced(function, arguments))


def lower(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The StableHLO of the function for GPUs."""
    call, traced = _traced(function, arguments)
    return jax.jit(call).trace(traced).lower(lowering_platforms=("cuda",)).as_text()


def _traced(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[int, Any]]:
    """A function of those arguments that are traced, and their types."""
    leaves, tree = jax.tree.flatten(dict(arguments), is_leaf=lambda value: value is None)
    values = [_numpy(v) if isinstance(v, Array) and v.is_numpy else v for v in leaves]
    traced = {i: jax.ShapeDtypeStruct(v.shape, v.dtype) for i, v in enumerate(values) if isinstance(v, Array)}

    def call(tracers: dict[int, Any]) -> Any:
        return function(**jax.tree.unflatten(tree, [tracers.get(i, value) for i, value in enumerate(values)]))

    return call, traced


def _numpy(value: Array) -> np.ndarray[Any, Any]:
    return np.broadcast_to(np.ones((), value.dtype), value.shape)


# Argument, what it is, what was wanted, what to do: of one sentence, in one line.
SENTENCE = re.compile(
    r"^[A-Za-z/][^\n]*\b(wanted|wants|which has no|is not that of|it is packed already)\b[^\n]*: [^\n]*\.$"
)


def judge(call: Callable[[], Any], is_right: bool) -> Any:
    """Fails unless a call that is right returns, and another one is refused in a sentence; what it returned, or None."""
    try:
        result = call()
    except MegaMoEError as error:
        assert not is_right, f"refused though it is right: {error}"
        assert SENTENCE.match(str(error)), f"no sentence of argument, got, wanted, what to do: {error}"
        return None
    assert is_right, "taken though it is wrong"
    return result


def outcome(call: Callable[[], Any]) -> Any:
    """What the call returns, or None where it is refused in a sentence: for calls of which either may be right."""
    try:
        return call()
    except MegaMoEError as error:
        assert SENTENCE.match(str(error)), f"no sentence of argument, got, wanted, what to do: {error}"
        return None
