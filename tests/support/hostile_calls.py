"""FFI calls of the handlers, as a program may write them: right ones, hostile ones, and generated ones.

Those of one device are `RIGHT` and `HOSTILE`, those of groups `RIGHT_OF_GROUPS` and `HOSTILE_OF_GROUPS`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jax_megamoe.primitives import _library
from jax_megamoe.primitives import wire_test as wire_test_primitive

Shape = tuple[int, ...]
Typed = tuple[str, Shape]
DTYPES: dict[str, Any] = {
    **{"pred": jnp.bool, "s8": jnp.int8, "s32": jnp.int32, "s64": jnp.int64, "u8": jnp.uint8, "u32": jnp.uint32},
    **{"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32, "f64": jnp.float64, "c64": jnp.complex64},
    **{"f8e4m3fn": jnp.float8_e4m3fn, "f8e5m2": jnp.float8_e5m2},
}
TARGETS = {
    "moe": _library.MOE_TARGET,
    "route": _library.ROUTE_TARGET,
    "moe_peers": _library.MOE_PEERS_TARGET,
    "wire_test": _library.WIRE_TEST_TARGET,
}
_KINDS: dict[str, Callable[[Any], Any]] = {
    **{"i64": np.int64, "s32": np.int32, "f32": np.float32, "str": str},
    "i64s": lambda text: np.array([int(number) for number in text.split(",") if number], np.int64),
}


@dataclasses.dataclass(frozen=True)
class FfiCall:
    """Operands and results by type and sizes, attributes by kind and value."""

    target: str
    operands: tuple[Typed, ...]
    results: tuple[Typed, ...]
    attributes: tuple[tuple[str, str, Any], ...]
    faults: tuple[str, ...] = ()  # of the machine, for the host's test only

    @property
    def line(self) -> str:
        """As tests/native/handlers_test.cc reads it."""
        parts = [self.target]
        for letter, arrays in (("a", self.operands), ("r", self.results)):
            parts += [" ".join(map(str, (letter, type_name, *shape))) for type_name, shape in arrays]
        parts += [f"n {name} {kind} {value}" for name, kind, value in self.attributes]
        parts += [f"f {fault}" for fault in self.faults]
        return ";".join(parts)

    @property
    def function(self) -> Callable[..., Any]:
        """As a function of the operands, for programs."""
        attributes = {name: _KINDS[kind](value) for name, kind, value in self.attributes}
        results = [jax.ShapeDtypeStruct(shape, DTYPES[type_name]) for type_name, shape in self.results]
        return lambda *operands: jax.ffi.ffi_call(TARGETS[self.target], results)(*operands, **attributes)

    @property
    def operand_types(self) -> list[jax.ShapeDtypeStruct]:
        """For programs; JAX has some of them under `jax.enable_x64` only."""
        return [jax.ShapeDtypeStruct(shape, DTYPES[type_name]) for type_name, shape in self.operands]

    @property
    def nbytes(self) -> int:
        """Of operands and results, eight bytes for an element."""
        return 8 * sum(math.prod(shape) for _, shape in (*self.operands, *self.results))


T, K, H, I, E, S = 3, 2, 256, 384, 4, 2
WORKSPACE = 1 << 24
_NUMBERS = ("activation_alpha", "activation_clamp", "activation_up_offset", "routed_scaling_factor")
_MOE_ATTRIBUTES: tuple[tuple[str, str, Any], ...] = (
    *((name, "f32", 1.0) for name in (*_NUMBERS, "situ_beta", "situ_linear_beta")),
    ("batch_invariant", "i64", 0),
)


def _leaves(format: str, experts: int, *lead: int) -> tuple[Typed, ...]:
    of_rows = ("f32", (*lead, experts, 6, 128, 2)), ("f32", (*lead, experts, 4, 64, 2))
    if format == "mxfp4":
        gate_up, down = ("u8", (*lead, experts, 6, 2, 8704)), ("u8", (*lead, experts, 4, 3, 4352))
        return gate_up, of_rows[0], down, of_rows[1]
    gate_up, down = ("f8e4m3fn", (*lead, experts, 6, 2, 16384)), ("f8e4m3fn", (*lead, experts, 4, 3, 8192))
    if format == "fp8_channel":
        return gate_up, of_rows[0], down, of_rows[1]
    return gate_up, ("f32", (*lead, experts, 6, 2, 4)), down, ("f32", (*lead, experts, 4, 2, 4))


def moe(format: str = "fp8_block", shared: bool = False, layers: int | None = None) -> FfiCall:
    lead = () if layers is None else (layers,)
    operands = (
        ("bf16", (T, H)),
        *_leaves(format, E, *lead),
        ("s32", (T, K)),
        ("f32", (T, K)),
        ("s32", ()),
        *(_leaves(format, S, *lead) if shared else ()),
    )
    results = (("bf16", (T, H)), ("s32", (E + S if shared else E,)), ("u8", (WORKSPACE,)))
    return FfiCall("moe", operands, results, _MOE_ATTRIBUTES)


def route(experts: int = 16, biased: bool = True) -> FfiCall:
    attributes = {"scoring": 1, "num_groups": 4, "top_groups": 2, "sums_two": 1, "renormalize": 1}
    return FfiCall(
        "route",
        (("f32", (T, experts)), ("f32", (experts if biased else 0,))),
        (("s32", (T, K)), ("f32", (T, K))),
        tuple((name, "i64", value) for name, value in attributes.items()),
    )


RANKS = 2
_GROUPS: tuple[tuple[str, str, Any], ...] = (
    ("replica_groups", "i64s", ",".join(map(str, range(RANKS)))),
    ("group_size", "i64", RANKS),
)


def moe_peers(format: str = "fp8_block", shared: bool = False, layers: int | None = None) -> FfiCall:
    """Of a rank; with its place in the mesh as the last operand."""
    alone = moe(format, shared, layers)
    numbers = {"timeout_microseconds": 3_000_000, "setup_timeout_microseconds": 20_000_000, "call_id": 7}
    more = tuple((name, "i64", value) for name, value in numbers.items())
    operands = (*alone.operands, ("s32", ()))
    return FfiCall("moe_peers", operands, alone.results, (*alone.attributes, *more, *_GROUPS))


def wire_test(**changes: int) -> FfiCall:
    numbers = {**wire_test_primitive.WireTest(bytes=4096, timeout_microseconds=3_000_000)._asdict(), **changes}
    attributes = tuple((name, "i64", value) for name, value in numbers.items())
    return FfiCall("wire_test", (("s32", (1,)),), (("u32", (RANKS, 16)),), (*attributes, *_GROUPS))


def with_operand(call: FfiCall, index: int, type_name: str, *shape: int) -> FfiCall:
    operands = list(call.operands)
    operands[index] = (type_name, shape)
    return dataclasses.replace(call, operands=tuple(operands))


def with_result(call: FfiCall, index: int, type_name: str, *shape: int) -> FfiCall:
    results = list(call.results)
    results[index] = (type_name, shape)
    return dataclasses.replace(call, results=tuple(results))


def with_attribute(call: FfiCall, name: str, kind: str, value: Any) -> FfiCall:
    others = tuple(attribute for attribute in call.attributes if attribute[0] != name)
    return dataclasses.replace(call, attributes=(*others, (name, kind, value)))


def without_attribute(call: FfiCall, name: str) -> FfiCall:
    return dataclasses.replace(call, attributes=tuple(a for a in call.attributes if a[0] != name))


RIGHT = {
    "moe": moe(),
    "moe of fp8_channel": moe("fp8_channel"),
    "moe of mxfp4": moe("mxfp4"),
    "moe of layers": moe(layers=5),
    "moe with shared experts": moe(shared=True),
    "moe of layers with shared experts": moe("mxfp4", shared=True, layers=3),
    "batch-invariant moe": with_attribute(moe(), "batch_invariant", "i64", 1),
    "moe exported before there was the option": without_attribute(moe(), "batch_invariant"),
    "route": route(),
    "route without a bias": route(biased=False),
}


# Small enough to be compiled and run on a GPU too.
HOSTILE = {
    "tokens of ids": with_operand(moe(), 5, "s32", T + 1, K),
    "tokens of x": with_operand(moe(), 0, "bf16", T + 1, H),
    "no tokens": dataclasses.replace(
        moe(),
        operands=(("bf16", (0, H)), *moe().operands[1:5], ("s32", (0, K)), ("f32", (0, K)), ("s32", ())),
        results=(("bf16", (0, H)), ("s32", (E,)), ("u8", (WORKSPACE,))),
    ),
    "rank of x": with_operand(moe(), 0, "bf16", T * H),
    "dtype of x": with_operand(moe(), 0, "f32", T, H),
    "hidden size of x": with_operand(moe(), 0, "bf16", T, H // 2),
    "experts of gate_up": with_operand(moe(), 1, "f8e4m3fn", E + 1, 6, 2, 16384),
    "experts of down": with_operand(moe(), 3, "f8e4m3fn", E - 1, 4, 3, 8192),
    "layers of one leaf": with_operand(moe(), 1, "f8e4m3fn", 5, E, 6, 2, 16384),
    "no layer": with_operand(moe(layers=1), 1, "f8e4m3fn", 0, E, 6, 2, 16384),
    "bytes instead of FP8": with_operand(moe(), 1, "u8", E, 6, 2, 16384),
    "scale of another format": with_operand(moe(), 2, "f32", E, 6, 128, 2),
    "rank of a scale": with_operand(moe(), 2, "f32", E * 6 * 2 * 4),
    "scalar scale": with_operand(moe(), 2, "f32"),
    "weights of slots": with_operand(moe(), 6, "f32", T, K - 1),
    "ids of 64 bits": with_operand(moe(), 5, "s64", T, K),
    "33 slots": with_operand(with_operand(moe(), 5, "s32", T, 33), 6, "f32", T, 33),
    "no slots": with_operand(with_operand(moe(), 5, "s32", T, 0), 6, "f32", T, 0),
    "two layers": with_operand(moe(), 7, "s32", 2),
    "float layer": with_operand(moe(), 7, "f32"),
    "y is short": with_result(moe(), 0, "bf16", T - 1, H),
    "y of FP16": with_result(moe(), 0, "f16", T, H),
    "load is short": with_result(moe(), 1, "s32", E - 1),
    "no workspace": with_result(moe(), 2, "u8", 0),
    "workspace is short": with_result(moe(), 2, "u8", 4096),
    "shared experts without room in the load": with_result(moe(shared=True), 1, "s32", E),
    "shared experts of another format": with_operand(moe(shared=True), 8, "u8", S, 6, 2, 8704),
    "shared experts of other layers": with_operand(moe(shared=True, layers=3), 8, "f8e4m3fn", 2, S, 6, 2, 16384),
    "an operand less": dataclasses.replace(moe(), operands=moe().operands[:-1]),
    "an operand more": dataclasses.replace(moe(), operands=(*moe().operands, ("s32", ()))),
    "a result less": dataclasses.replace(moe(), results=moe().results[:2]),
    "a result more": dataclasses.replace(moe(), results=(*moe().results, ("s32", (E,)))),
    "no clamp": without_attribute(moe(), "activation_clamp"),
    "no factor": without_attribute(moe(), "routed_scaling_factor"),
    "clamp is text": with_attribute(moe(), "activation_clamp", "str", "seven"),
    "batch_invariant is two": with_attribute(moe(), "batch_invariant", "i64", 2),
    "batch_invariant is a float": with_attribute(moe(), "batch_invariant", "f32", 1.0),
    "factor is an integer": with_attribute(moe(), "routed_scaling_factor", "i64", 2),
    "logits of BF16": with_operand(route(), 0, "bf16", T, 16),
    "logits without tokens": with_operand(route(), 0, "f32", 16),
    "a bias less": with_operand(route(), 1, "f32", 15),
    "one bias": with_operand(route(), 1, "f32", 1),
    "ids of other tokens": with_result(route(), 0, "s32", T + 1, K),
    "weights of other tokens": with_result(route(), 1, "f32", T - 1, K),
    "1025 experts": with_attribute(route(1025), "num_groups", "i64", 1),
    "more selected than there are": with_attribute(route(), "top_groups", "i64", 0),
    "no group": with_attribute(route(), "num_groups", "i64", 0),
    "a negative group": with_attribute(route(), "num_groups", "i64", -4),
    "groups that do not divide": with_attribute(route(), "num_groups", "i64", 5),
    "unknown scoring": with_attribute(route(), "scoring", "i64", 3),
    "negative scoring": with_attribute(route(), "scoring", "i64", -1),
    "scoring of 32 bits": with_attribute(route(), "scoring", "s32", 1),
    "no scoring": without_attribute(route(), "scoring"),
}
RIGHT_OF_GROUPS = {
    "group's moe": moe_peers(),
    "group's moe of mxfp4 in layers with shared experts": moe_peers("mxfp4", shared=True, layers=3),
    "group's batch-invariant moe": with_attribute(moe_peers(), "batch_invariant", "i64", 1),
    "wire test": wire_test(),
    "pushes to one rank": wire_test(mode=2, shift=1, iterations=3),
}
# Small enough to be compiled and run on two GPUs too.
HOSTILE_OF_GROUPS = {
    "group: tokens of ids": with_operand(moe_peers(), 5, "s32", T + 1, K),
    "group: experts of down": with_operand(moe_peers(), 3, "f8e4m3fn", E - 1, 4, 3, 8192),
    "group: scale of another format": with_operand(moe_peers(), 2, "f32", E, 6, 128, 2),
    "group: shared experts of other layers": with_operand(
        moe_peers(shared=True, layers=3), 8, "f8e4m3fn", 2, S, 6, 2, 16384
    ),
    "group: y is short": with_result(moe_peers(), 0, "bf16", T - 1, H),
    "group: load is short": with_result(moe_peers(), 1, "s32", E - 1),
    "group: workspace is short": with_result(moe_peers(), 2, "u8", 1024),
    "group: no place in the mesh": dataclasses.replace(moe_peers(), operands=moe_peers().operands[:-1]),
    "group: two places in the mesh": with_operand(moe_peers(), 8, "s32", 2),
    "group: a place of 64 bits": with_operand(moe_peers(), 8, "s64"),
    "group: a place with fractions": with_operand(moe_peers(), 8, "f32"),
    "group: more experts than are served": dataclasses.replace(
        moe_peers(),
        operands=(moe_peers().operands[0], *_leaves("fp8_block", 513), *moe_peers().operands[5:]),
        results=(("bf16", (T, H)), ("s32", (513,)), ("u8", (WORKSPACE,))),
    ),
    "group: no timeout": without_attribute(moe_peers(), "timeout_microseconds"),
    "group: a timeout of nothing": with_attribute(moe_peers(), "timeout_microseconds", "i64", 0),
    "group: a negative timeout": with_attribute(moe_peers(), "timeout_microseconds", "i64", -1),
    "group: a timeout without end": with_attribute(moe_peers(), "timeout_microseconds", "i64", (1 << 63) - 1),
    "group: a set-up without end": with_attribute(moe_peers(), "setup_timeout_microseconds", "i64", (1 << 40) + 1),
    "group: a timeout of 32 bits": with_attribute(moe_peers(), "timeout_microseconds", "s32", 1000),
    "group: no number of the call": without_attribute(moe_peers(), "call_id"),
    "group: the number is text": with_attribute(moe_peers(), "call_id", "str", "seven"),
    "group: no groups": without_attribute(moe_peers(), "replica_groups"),
    "group: no size": without_attribute(moe_peers(), "group_size"),
    "group: groups are a number": with_attribute(moe_peers(), "replica_groups", "i64", 2),
    "group: groups of nobody": with_attribute(moe_peers(), "replica_groups", "i64s", ""),
    "group: groups of no size": with_attribute(moe_peers(), "group_size", "i64", 0),
    "group: groups of a negative size": with_attribute(moe_peers(), "group_size", "i64", -2),
    "group: three ids in groups of two": with_attribute(moe_peers(), "replica_groups", "i64s", "0,1,2"),
    "group: a device twice": with_attribute(moe_peers(), "replica_groups", "i64s", "0,0"),
    "group: a device twice in other groups": with_attribute(moe_peers(), "replica_groups", "i64s", "0,1,1,0"),
    "group: a negative device": with_attribute(moe_peers(), "replica_groups", "i64s", "0,-1"),
    "wires: 17 bytes": wire_test(bytes=17),
    "wires: no bytes": wire_test(bytes=0),
    "wires: bytes below zero": wire_test(bytes=-16),
    "wires: more bytes than there can be": wire_test(bytes=(1 << 30) + 16),
    "wires: unknown mode": wire_test(mode=3),
    "wires: negative mode": wire_test(mode=-1),
    "wires: no iterations": wire_test(iterations=0),
    "wires: iterations without end": wire_test(iterations=1 << 40),
    "wires: a shift beyond the ranks": wire_test(shift=RANKS),
    "wires: a negative shift": wire_test(shift=-1),
    "wires: a silent rank that is none": wire_test(mute=1 << 32),
    "wires: no timeout": wire_test(timeout_microseconds=0),
    "wires: a timeout without end": wire_test(timeout_microseconds=(1 << 63) - 1),
    "wires: unknown transport": wire_test(transport=3),
    "wires: transport is a float": with_attribute(wire_test(), "transport", "f32", 1.0),
    "wires: rows are short": with_result(wire_test(), 0, "u32", RANKS, 15),
    "wires: rows for more ranks": with_result(wire_test(), 0, "u32", RANKS + 1, 16),
    "wires: two places in the mesh": with_operand(wire_test(), 0, "s32", 2),
    "wires: a place of 64 bits": with_operand(wire_test(), 0, "s64", 1),
    "wires: an operand more": dataclasses.replace(wire_test(), operands=(("s32", (1,)), ("s32", (1,)))),
    "wires: a result more": dataclasses.replace(wire_test(), results=(("u32", (RANKS, 16)), ("s32", (1,)))),
    "wires: no groups": without_attribute(wire_test(), "replica_groups"),
    "wires: a device twice": with_attribute(wire_test(), "replica_groups", "i64s", "1,1"),
}
SIZES = [0, 1, 2, 3, 4, 6, 32, 33, 64, 128, 129, 256, 384, 1024, 1025, 4352, 8192, 8704, 16384]
SIZES += [1 << 20, (1 << 20) + 1, 1 << 28, (1 << 28) + 1, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 32) + 3, 1 << 40]
VALUES = [0, 1, 2, 3, 4, 5, -1, 16, 17, 1 << 31, 1 << 32, (1 << 32) + 4, (1 << 63) - 1, -(1 << 63)]


GROUPS = ["0,1", "1,0", "0", "", "0,0", "0,1,2", "0,1,2,3", "-1,0", ",".join(map(str, range(65)))]


@st.composite
def changed_calls(draw: st.DrawFn, right: Mapping[str, FfiCall] = RIGHT) -> FfiCall:
    """A right call with one to four changes, some of which fit each other."""
    call = draw(st.sampled_from(list(right.values())))
    for _ in range(draw(st.integers(1, 4))):
        arrays = [*call.operands, *call.results]
        what = draw(st.sampled_from(["size", "everywhere", "everywhere", "type", "rank", "attribute", "swap", "count"]))
        if what == "attribute":
            names = [name for name, _, _ in call.attributes]
            if names:
                name = draw(st.sampled_from(names))
                if draw(st.integers(0, 4)) == 0:
                    call = without_attribute(call, name)
                else:
                    kind = draw(st.sampled_from(["i64", "i64", "f32", "s32", "str"]))
                    value: Any = draw(st.sampled_from(VALUES))
                    value = value if abs(value) < 1 << 31 or kind == "i64" else 7
                    if name == "replica_groups" and draw(st.booleans()):
                        kind, value = "i64s", draw(st.sampled_from(GROUPS))
                    call = with_attribute(call, name, kind, value)
            continue
        place = draw(st.integers(0, len(arrays) - 1))
        type_name, shape = arrays[place]
        if what == "everywhere":  # one size, wherever it stands: calls of other sizes that fit
            sizes = sorted({size for _, shape in arrays for size in shape})
            old, new = draw(st.sampled_from(sizes)), draw(st.sampled_from(SIZES))
            arrays = [(t, tuple(new if size == old else size for size in shape)) for t, shape in arrays]
        elif what == "size" and shape:
            changed = list(shape)
            changed[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from(SIZES))
            arrays[place] = (type_name, tuple(changed))
        elif what == "type":
            arrays[place] = (draw(st.sampled_from(sorted(DTYPES))), shape)
        elif what == "rank":
            more = (*shape, draw(st.sampled_from(SIZES))), shape[1:], (math.prod(shape),), (), (1, *shape)
            arrays[place] = (type_name, draw(st.sampled_from(more)))
        elif what == "swap":
            other = draw(st.integers(0, len(arrays) - 1))
            arrays[place], arrays[other] = arrays[other], arrays[place]
        split = len(call.operands)
        if what == "count":
            arrays.pop(place) if draw(st.booleans()) else arrays.insert(place, arrays[place])
            split += len(arrays) - len(call.operands) - len(call.results) if place < split else 0
        call = dataclasses.replace(call, operands=tuple(arrays[:split]), results=tuple(arrays[split:]))
        if not call.results or not call.operands:
            return next(iter(right.values()))
    return call
