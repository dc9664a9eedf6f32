"""How the thread blocks of a cluster share an expert's units, compiled for the host."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.native_program import compile_program

CHUNK = 128  # tokens
WARPGROUP = 64


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(tmp_path_factory.mktemp("native"), "cluster_share_test")


@settings(deadline=None, max_examples=100)
@given(experts=st.lists(st.tuples(st.integers(1, 1500), st.integers(1, 29)), min_size=1, max_size=20))
def test_every_unit_is_one_block_s_and_both_agree_on_what_they_share(program, experts):
    text = "\n".join(f"{tokens} {tiles}" for tokens, tiles in experts)
    for (tokens, tiles), block in zip(experts, program(text).strip().split("\n\n"), strict=True):
        chunks = -(-tokens // CHUNK)
        sizes = [min(CHUNK, tokens - CHUNK * chunk) for chunk in range(chunks)]
        units = []
        for line in block.splitlines():
            first, second = (list(map(int, line.split()[half : half + 6])) for half in (0, 6))
            assert first[3:5] == second[3:5], "both share the same"
            shares_weights, shares_tokens = first[3:5]
            for tile, chunk, idle, *_ in (first, second):
                assert 0 <= tile < tiles, "an idle block's tile is there to be read"
                assert 0 <= chunk < chunks
                if not idle:
                    units.append((tile, chunk))
            if shares_weights:
                assert first[0] == second[0]
                assert first[1] != second[1]
                assert all(sizes[chunk] > WARPGROUP for chunk in (first[1], second[1]))
                assert first[2] == second[2]
            if shares_tokens:
                assert first[1] == second[1]
                assert not first[2]
                assert not second[2]
        assert sorted(units) == [(tile, chunk) for tile in range(tiles) for chunk in range(chunks)]
