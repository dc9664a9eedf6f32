"""Hostile programs on a Hopper GPU: calls of the handlers that do not fit are refused, and nothing is launched."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given

import jax_megamoe as mm
from jax_megamoe.primitives import _library
from tests.support import hostile_calls
from tests.support.compare import bits
from tests.support.hostile import cases
from tests.support.hostile_calls import FfiCall
from tests.support.problems import Sizes, make_inputs, make_weights
from tests.support.skips import gpu_tests, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())

SIZES = Sizes(hidden=512, inter=384, num_experts=8, top_k=4)
MOST_BYTES = 256 << 20  # of a generated call: larger ones are tried on the host alone


def execute_count() -> int:
    assert _library._core is not None
    return int(_library._core.moe_execute_count())


def run(call: FfiCall) -> str:
    """What a program of this one call says: "launched", or why it was refused."""
    with jax.enable_x64(True):
        operands = [jnp.zeros(array.shape, array.dtype) for array in call.operand_types]
        try:
            jax.block_until_ready(jax.jit(call.function)(*operands))
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            return str(error)
    return "launched"


@functools.cache
def right_call() -> Any:
    x, ids, topk_weights = make_inputs(40, SIZES, "masked")
    program = jax.jit(mm.moe)
    return lambda: bits(program(x, make_weights(SIZES), ids, topk_weights))


@functools.cache
def right_bits() -> np.ndarray:
    return right_call()()


def assert_the_next_call_is_right() -> None:
    np.testing.assert_array_equal(right_call()(), right_bits())


@pytest.mark.parametrize("name", hostile_calls.RIGHT)
def test_calls_as_the_package_makes_them_are_launched(name):
    assert run(hostile_calls.RIGHT[name]) == "launched"


@pytest.mark.parametrize("name", hostile_calls.HOSTILE)
def test_a_hostile_call_is_refused(name):
    right_bits()
    before = execute_count()
    assert run(hostile_calls.HOSTILE[name]) != "launched"
    assert execute_count() == before
    assert_the_next_call_is_right()


@cases(40)
@given(call=hostile_calls.changed_calls().filter(lambda call: call.nbytes < MOST_BYTES))
def test_generated_calls_do_no_harm(call):
    right_bits()
    event("launched" if run(call) == "launched" else "refused")
    assert_the_next_call_is_right()
