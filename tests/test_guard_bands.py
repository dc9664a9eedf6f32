"""What `build/probe check` sees of a kernel that writes beyond a buffer, tried on the host: bands that are damaged.

That a launch on a GPU is seen to do so: `build/probe overrun`, a part of `scripts/probe check`.
"""

from pathlib import Path

import pytest

from tests.support.native_program import NATIVE, TESTS, compile_program, cuda_include

BAND = 128 << 10
BENCH = TESTS.parent / "bench" / "native"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What is reported of a buffer `y` of 1001 bytes after a write."""
    flags: list[str | Path] = ["-O0", f"-I{BENCH}", "-isystem", cuda_include()]
    program = compile_program(tmp_path_factory.mktemp("native"), "guards_test", NATIVE / "fake_cuda.cc", flags=flags)
    return lambda side, offset, count: program(f"{side} {offset} {count}\n").splitlines()


@pytest.mark.parametrize(
    ("side", "offset", "count", "wanted"),
    [
        ("behind", 0, 1, "y is written behind its end, first at byte 0, 1 bytes in all"),
        ("behind", 0, 512, "y is written behind its end, first at byte 0, 512 bytes in all"),
        ("behind", BAND - 1, 1, f"y is written behind its end, first at byte {BAND - 1}, 1 bytes in all"),
        ("before", -1, 1, "y is written before its begin, first at byte -1, 1 bytes in all"),
        ("before", -BAND, 3, f"y is written before its begin, first at byte {-BAND}, 3 bytes in all"),
    ],
)
def test_a_write_beyond_a_buffer_is_reported(report, side, offset, count, wanted):
    assert report(side, offset, count) == [wanted]


def test_both_sides_are_reported(report):
    before, behind = report("before", -2, 1001 + 4)
    assert before == "y is written before its begin, first at byte -2, 2 bytes in all"
    assert behind == "y is written behind its end, first at byte 0, 2 bytes in all"


@pytest.mark.parametrize(("offset", "count"), [(0, 1001), (1000, 1), (5, 0)])
def test_writes_inside_a_buffer_are_none(report, offset, count):
    assert report("inside", offset, count) == ["whole"]
