"""The kernel in one page compiles, and what ptxas makes of it is what its reader is told to expect."""

from tests.support.teaching import compile_teaching


def test_it_compiles_without_spills(tmp_path):
    program, report = compile_teaching(tmp_path)
    assert program.exists()
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
