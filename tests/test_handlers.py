"""The FFI handlers of one device against hostile programs, compiled for the host: what does not fit is not launched.

Sizes, dtypes and attributes are those that a program written by hand may have, far from what `moe` and `route` make. A
launch that is fake looks whether each buffer holds what the kernel would touch (tests/native/handlers_test.cc). The
same programs on a GPU: tests/gpu/test_handlers.py.
"""

import jax
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.support import hostile_calls
from tests.support.hostile import cases
from tests.support.hostile_calls import FfiCall
from tests.support.native_program import compile_handlers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What becomes of calls."""
    program = compile_handlers(tmp_path_factory.mktemp("native"))
    return lambda calls: program("".join(f"{call.line}\n" for call in calls)).splitlines()


@pytest.mark.parametrize("name", hostile_calls.RIGHT)
def test_calls_as_the_package_makes_them_are_launched(run, name):
    assert run([hostile_calls.RIGHT[name]]) == ["launched"]


@pytest.mark.parametrize("name", hostile_calls.HOSTILE)
def test_a_hostile_call_is_refused(run, name):
    (found,) = run([hostile_calls.HOSTILE[name]])
    assert found.startswith("refused: ")


def check(run, calls: list[FfiCall]) -> None:
    for call, found in zip(calls, run(calls), strict=True):
        event(found.partition(":")[0])
        assert found == "launched" or found.startswith("refused: "), f"{found}\n{call.line}"


@cases(60)
@given(calls=st.lists(hostile_calls.changed_calls(), min_size=1, max_size=20))
def test_what_is_launched_fits_its_buffers(run, calls):
    check(run, calls)


@pytest.mark.parametrize("name", hostile_calls.HOSTILE)
def test_hostile_calls_are_programs_for_gpus(name):
    """What tests/gpu/test_handlers.py runs."""
    call = hostile_calls.HOSTILE[name]
    with jax.enable_x64(True):
        program = jax.jit(call.function).trace(*call.operand_types).lower(lowering_platforms=("cuda",)).as_text()
    assert f"@{hostile_calls.TARGETS[call.target]}(" in program
    assert all(f"{attribute} = " in program for attribute, _, _ in call.attributes)
