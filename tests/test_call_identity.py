"""Which call of a program a rank is in: an attribute that tells calls apart, and is the same in every process."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from tests.support.cuda_lowering import FUSED, calls, cuda_text
from tests.support.expert_layer import make_layer
from tests.support.meshes import AUTO, MESHES, make_mesh, place_all
from tests.support.skips import unless, why_no_host_devices

pytestmark = [
    unless(why_no_host_devices()),
    pytest.mark.usefixtures("built"),
]


def arguments(sizes: str = "data x expert") -> tuple[Any, ...]:
    return place_all(make_mesh(MESHES[sizes], AUTO), make_layer())


def ids_of_calls(text: str) -> list[int]:
    ids = [int(found) for found in re.findall(r"call_id = (\d+) : i64", text)]
    assert calls(text) == [FUSED] * len(ids) and all(n < 1 << 32 for n in ids)
    return ids


def mapped(manual: tuple[str, ...]) -> Callable[..., Any]:
    mesh = make_mesh(MESHES["data x expert"], AUTO)
    experts = P("expert") if "expert" in manual else P()
    specs: Any = {"in_specs": (P(manual), experts, P(manual), P(manual)), "out_specs": P(manual)}
    return jax.shard_map(mm.moe, mesh=mesh, axis_names=set(manual), **specs)


def twice_in_shard_map() -> Callable[..., Any]:
    tokens = P(("data", "expert"))
    return jax.shard_map(
        lambda *a: mm.moe(*a) + mm.moe(*a),
        mesh=make_mesh(MESHES["data x expert"], AUTO),
        in_specs=(tokens, P("expert"), tokens, tokens),
        out_specs=tokens,
    )


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *a: function(*a) + function(*a)


def in_branches(x: Any, *others: Any) -> Any:
    return jax.lax.cond(x[0, 0] > 0, lambda: mm.moe(x, *others), lambda: mm.moe(x, *others) * 2)


CASES = {
    "global": lambda: twice(mm.moe),
    "shard_map": lambda: twice(mapped(("data", "expert"))),
    "shard_map over data": lambda: twice(mapped(("data",))),
    "inside shard_map": twice_in_shard_map,
    "branches": lambda: in_branches,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equal_calls_stay_apart(case):
    ids = ids_of_calls(cuda_text(case(), *arguments()))
    assert len(ids) == 2 and ids[0] != ids[1]


def test_the_name_of_the_program_counts():
    def one(*a: Any) -> Any:
        return mm.moe(*a)

    def other(*a: Any) -> Any:
        return mm.moe(*a)

    texts = [
        jax.jit(function).trace(*arguments()).lower(lowering_platforms=("cuda",)).as_text() for function in (one, other)
    ]
    assert ids_of_calls(texts[0]) != ids_of_calls(texts[1])


def test_calls_without_a_use_are_dropped():
    def some(*a: Any) -> Any:
        mm.moe(*a)
        return mm.moe(*a)

    assert len(ids_of_calls(cuda_text(some, *arguments()))) == 1


PROGRAM = """
import jax, tests.conftest, jax_megamoe as mm
from jax_megamoe.primitives import _library
from tests import test_call_identity as calls
from tests.support import cuda_lowering
_library._core, jax.local_devices = cuda_lowering.fake_core(), cuda_lowering.no_devices
print(cuda_lowering.cuda_text(calls.twice(mm.moe), *calls.arguments()), end="")
"""


def test_every_process_has_the_same_program():
    wanted = cuda_text(twice(mm.moe), *arguments())
    assert wanted == cuda_text(twice(mm.moe), *arguments())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == wanted
