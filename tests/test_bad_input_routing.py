"""Generated arguments of routers, replicas and sizes: refused in a sentence while tracing, or results of right types."""

from typing import Any, get_args

import ml_dtypes
import numpy as np
from hypothesis import event, given
from hypothesis import strategies as st

import jax_megamoe as mm
from jax_megamoe.routing_arrays import GroupScoring, Scoring
from tests.support.hostile import Array, array, arrays, cases, has, judge, outcome, trace

I32, F32 = np.int32, np.float32
FLOATS = (
    {np.dtype(t) for t in (np.float16, F32, np.float64, ml_dtypes.bfloat16)}
    | {np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz)}
    | {np.dtype(t) for t in (ml_dtypes.float8_e8m0fnu, ml_dtypes.float4_e2m1fn)}
)
INTEGERS = {np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
INTEGERS |= {np.dtype(t) for t in (ml_dtypes.int4, ml_dtypes.uint4)}
COUNTS: list[Any] = [1, 1, 2, 3, 4, 8, 32, 0, -1, True, 1.0, "1", None, np.int64(2), np.float64(2), 10**5000, [1]]
CHOICES: list[Any] = ["softmax", "", None, 0, b"max", ["max"], ("sigmoid",), "x\n" * 500]


def is_of(value: Any, dtypes: set[np.dtype[Any]], shape: tuple[int, ...] | None = None) -> bool:
    return isinstance(value, Array) and value.dtype in dtypes and (shape is None or value.shape == shape)


def is_index(value: Any, shape: tuple[int, ...] | None = None) -> bool:
    """Integers of sizes that int32 counts."""
    return is_of(value, INTEGERS, shape) and max(value.shape, default=0) < 1 << 31


def is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@cases(300)
@given(data=st.data())
def test_route(data):
    draw = data.draw
    wrong = draw(st.sampled_from([0.0, 0.0, 0.1, 0.4]))
    lead = draw(st.sampled_from([(), (0,), (3,), (2, 2), (600,)]))
    num_experts = draw(st.sampled_from([1, 8, 8, 12, 1024, 1500]))
    logits = draw(arrays((*lead, num_experts), draw(st.sampled_from(sorted(FLOATS, key=str))), wrong))
    top_k = draw(st.sampled_from([1, 2, 2, 2] + COUNTS))
    options: dict[str, Any] = {}
    for name in draw(
        st.lists(st.sampled_from(["scoring", "bias", "groups", "hash", "image", "flag", "how"]), unique=True)
    ):
        if name == "scoring":
            options["scoring"] = draw(st.sampled_from([*get_args(Scoring), *CHOICES[1:]]))
        elif name == "bias":
            options["bias"] = draw(arrays((num_experts,), F32, wrong))
        elif name == "groups":
            options |= {"num_groups": draw(st.sampled_from([1, 2, 4] + COUNTS))}
            options |= {"top_groups": draw(st.sampled_from([None, 1, 2] + COUNTS))}
            options |= {"group_scoring": draw(st.sampled_from([*get_args(GroupScoring) * 3, *CHOICES]))}
        elif name == "hash":
            options["token_ids"] = draw(arrays(lead, I32, wrong))
            options["hash_table"] = draw(arrays((16, top_k if is_int(top_k) and 0 < top_k < 99 else 2), I32, wrong))
        elif name == "image":
            options["image_bias"] = draw(arrays((num_experts,), F32, wrong))
            options["is_image"] = draw(arrays(lead, np.bool_, wrong))
        elif name == "flag":
            options["renormalize"] = draw(st.sampled_from([True, False, 0, 1, 2, None, "no"]))
        else:
            options["implementation"] = draw(st.sampled_from([None, "reference", "cuda", "collective", 0]))
    right = is_of(logits, FLOATS) and len(logits.shape) > 0 and 0 < logits.shape[-1] < 1 << 31
    if right:
        lead, num_experts = logits.shape[:-1], logits.shape[-1]
        flag, how = options.get("renormalize", True), options.get("implementation")
        right = (isinstance(flag, bool) or (is_int(flag) and flag in (0, 1))) and how in (None, "reference", "cuda")
        right &= options.get("scoring", "softmax") in get_args(Scoring)
        right &= options.get("group_scoring", "max") in get_args(GroupScoring)
        groups, top_groups = options.get("num_groups", 1), options.get("top_groups")
        right &= is_int(groups) and 1 <= groups <= num_experts and num_experts % groups == 0
        right = right and (top_groups is None or (is_int(top_groups) and 1 <= top_groups <= groups))
        of = (groups if top_groups is None else top_groups) * (num_experts // groups) if right else 0
        right = right and is_int(top_k) and 1 <= top_k <= of
        for name in ("bias", "image_bias"):
            bias = options.get(name)
            right &= bias is None or is_of(bias, FLOATS | INTEGERS, (num_experts,))
        for pair in (("token_ids", "hash_table"), ("image_bias", "is_image")):
            right &= (options.get(pair[0]) is None) == (options.get(pair[1]) is None)
        ids, table = options.get("token_ids"), options.get("hash_table")
        right = right and (ids is None or is_of(ids, INTEGERS, lead))
        right = right and (table is None or (is_of(table, INTEGERS) and len(table.shape) == 2 and table.shape[0] > 0))
        right = right and (table is None or table.shape[1] == top_k)
        image = options.get("is_image")
        right = right and (image is None or has(image, lead, np.bool_))
        if right and how == "cuda":
            right = num_experts <= 1024 and top_k <= 32 and ids is None and image is None
    event("right" if right else "wrong")
    found = judge(lambda: trace(mm.route, {"logits": logits, "top_k": top_k, **options}), bool(right))
    if right:
        assert [(a.shape, a.dtype) for a in found] == [((*lead, top_k), I32), ((*lead, top_k), F32)]


MAP_COUNTS: list[Any] = [*(np.array(c) for c in ([1, 2, 1], [0, 1, 1], [1, 3, 1], [1, 1], [[1]], [1.0, 1, 1], []))]


@cases(200)
@given(data=st.data())
def test_replicas(data):
    draw = data.draw
    wrong, kind = draw(st.sampled_from([0.0, 0.1, 0.4])), draw(st.sampled_from(["physical", "load", "map"]))
    integer = draw(st.sampled_from(sorted(INTEGERS, key=str)))
    if kind == "map":
        ids, numbers = draw(arrays((5,), integer, wrong)), [draw(st.sampled_from([3, 2] + COUNTS)) for _ in range(2)]
        right = is_index(ids) and len(ids.shape) == 1
        right &= all(is_int(n) and 1 <= n < 1 << 31 for n in numbers)
        arguments = {"expert_ids": ids, "num_experts": numbers[0], "max_replicas": numbers[1]}
        found = judge(lambda: trace(mm.replica_map, arguments), right)
        if right:
            assert [(a.shape, a.dtype) for a in found] == [((numbers[0], numbers[1]), I32), ((numbers[0],), I32)]
        return
    table = draw(arrays((3, 2), integer, wrong))
    counts = draw(st.sampled_from(MAP_COUNTS)) if draw(st.integers(0, 3)) == 0 else draw(arrays((3,), integer, wrong))
    right = is_index(table) and len(table.shape) == 2 and table.size > 0
    if isinstance(counts, np.ndarray):
        is_map = counts.dtype.kind == "i" and counts.shape == table.shape[:1] if right else False
        right = bool(is_map and ((counts >= 1) & (counts <= table.shape[1])).all())
    else:
        right = right and is_index(counts, table.shape[:1])
    first = draw(
        st.sampled_from([0, -1, 10**30, -(10**30), array((), I32), array((), np.uint8), 1.0, True, array((1,), I32)])
    )
    ids = draw(arrays((4, 2) if kind == "physical" else (6,), integer, wrong))
    right = right and is_index(ids) and len(ids.shape) > 0
    common = {"physical_ids": table, "num_replicas": counts}
    if kind == "physical":
        right = right and (is_int(first) or is_of(first, INTEGERS, ()))
        found = judge(lambda: trace(mm.to_physical, {"ids": ids, **common, "first_token": first}), bool(right))
        shape = ids.shape if right else ()
    else:
        right = right and ids.shape[-1] > 0
        found = judge(lambda: trace(mm.logical_load, {"load": ids, **common}), bool(right))
        shape = (*ids.shape[:-1], table.shape[0]) if right else ()
    if right:
        assert (found.shape, found.dtype) == (shape, I32)


SIZES: list[Any] = [*(1, 2, 8, 32, 128, 256, 1024, 0, -1, 33, 1 << 20, (1 << 31) - 1, 1 << 31, 10**30, 10**5000)]
SIZES += [1.5, "8", None, True, np.int64(8), [8]]


@cases(150)
@given(data=st.data())
def test_buffer_bytes(data, cuda_core):
    names = ("num_tokens", "top_k", "hidden_size", "intermediate_size", "num_experts", "num_ranks")
    right = {
        "num_tokens": 64,
        "top_k": 2,
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_experts": 8,
        "num_ranks": 2,
    }
    changed = {
        name: data.draw(st.sampled_from(SIZES)) for name in data.draw(st.lists(st.sampled_from(names), max_size=3))
    }
    if data.draw(st.integers(0, 5)) == 0:
        changed["format"] = data.draw(st.sampled_from(["mxfp4", "fp8_channel", "fp8", "", None, 0, b"mxfp4"]))
    found = outcome(lambda: mm.expert_parallel.buffer_bytes(**{**right, **changed}))
    assert found is not None or changed
    if found is not None:
        tokens, hidden = (changed.get(n, right[n]) for n in ("num_tokens", "hidden_size"))
        # At least the tokens' FP8 values, which the rank takes from its peers and keeps for itself.
        assert found.symmetric + found.scratch >= tokens * hidden
