"""The FFI handlers against hostile programs, compiled for the host: what does not fit is not launched.

Sizes, dtypes and attributes are those that a program written by hand may have, far from what `moe` and `route` make. A
launch that is fake looks whether each buffer holds what the kernel would touch (tests/native/fake_launches.cc), those
of a group with what its ranks share. The same programs on a GPU: tests/gpu/test_handlers.py, and on two
tests/gpu/test_group_handlers.py. Machines on which a right call cannot be served are here, too.
"""

import dataclasses
import re

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


RIGHT = hostile_calls.RIGHT | hostile_calls.RIGHT_OF_GROUPS
HOSTILE = hostile_calls.HOSTILE | hostile_calls.HOSTILE_OF_GROUPS


@pytest.mark.parametrize("name", RIGHT)
def test_calls_as_the_package_makes_them_are_launched(run, name):
    assert run([RIGHT[name]]) == ["launched"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_call_is_refused(run, name):
    found, after = run([HOSTILE[name], RIGHT["moe"]])
    assert found.startswith("refused: ") and after == "launched"


# What is wrong with a machine, as tests/native/handlers_test.cc reads it, and what is said of it.
FAULTS = {
    "no extension": (
        "extension none",
        r"does not offer the communicators .* \(.*not found.*\); install jaxlib 0\.11\.2",
    ),
    "another extension": (
        "extension 0.3",
        r"does not offer the communicators .* \(.*0\.3.*\); install jaxlib 0\.11\.2",
    ),
    "another GPU": ("capability 8", r"compute capability 8\.0; the fused kernel needs 9\.0 \(Hopper\): pass"),
    "no memory": ("memory 1024", r"allocating the counters failed: .*; leave room .*XLA_PYTHON_CLIENT_MEM_FRACTION"),
    "old driver": ("driver", r"choosing the device failed: .*; update the driver, or build the package with an older"),
}


@pytest.mark.parametrize(("fault", "sentence"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("name", ["moe", "group's moe"])
def test_a_machine_that_cannot_serve_a_call(run, name, fault, sentence):
    """One sentence, nothing launched, no error left behind; and a call on a machine that can is served at once."""
    call = RIGHT[name]
    found, after = run([dataclasses.replace(call, faults=(fault,)), call])
    assert after == "launched"
    if name == "moe" and "extension" in fault:
        assert found == "launched"  # it needs none
    else:
        assert re.fullmatch(f"refused: jax_megamoe(.moe)?: [^\n]*{sentence}[^\n]*\\.", found)


@pytest.mark.parametrize("fault", ["extension none", "extension 1.0", "extension 0.3"])
def test_a_wire_test_without_the_extension(run, fault):
    found, after = run([dataclasses.replace(RIGHT["wire test"], faults=(fault,)), RIGHT["wire test"]])
    assert after == "launched" and "install jaxlib 0.11.2 to 0.12" in found


def check(run, calls: list[FfiCall]) -> None:
    for call, found in zip(calls, run(calls), strict=True):
        event(found.partition(":")[0])
        assert found == "launched" or found.startswith("refused: "), f"{found}\n{call.line}"


@cases(60)
@given(calls=st.lists(hostile_calls.changed_calls(RIGHT), min_size=1, max_size=20))
def test_what_is_launched_fits_its_buffers(run, calls):
    check(run, calls)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_calls_are_programs_for_gpus(name):
    """What tests/gpu/test_handlers.py and tests/gpu/test_group_handlers.py run."""
    call = HOSTILE[name]
    with jax.enable_x64(True):
        program = jax.jit(call.function).trace(*call.operand_types).lower(lowering_platforms=("cuda",)).as_text()
    assert f"@{hostile_calls.TARGETS[call.target]}(" in program
    assert all(f"{attribute} = " in program for attribute, _, _ in call.attributes)
