"""Which orientation of the multiply a call takes, compiled for the host."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.native_program import compile_program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(tmp_path_factory.mktemp("native"), "orientation_test")


def swaps(program, calls):
    return [flag == "1" for flag in program("\n".join(" ".join(map(str, call)) for call in calls)).split()]


@settings(deadline=None, max_examples=50)
@given(
    top_k=st.integers(1, 32),
    experts=st.integers(1, 1024),
    blocks=st.integers(1, 64),
    tokens=st.lists(st.integers(1, 1 << 20), min_size=2, max_size=20),
)
def test_more_tokens_never_go_back_to_swap(program, top_k, experts, blocks, tokens):
    flags = swaps(program, [(t, top_k, experts, 128 * blocks, 1) for t in sorted(tokens)])
    assert flags == sorted(flags, reverse=True)
    # Beyond 56 pairs, the chunk's limit, most experts would have two chunks.
    for t, flag in zip(sorted(tokens), flags, strict=True):
        assert not (flag and t * top_k > 56 * experts)


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.integers(1, 4096),
    top_k=st.integers(1, 16),
    experts=st.integers(1, 128),
    blocks=st.integers(1, 64),
    ranks=st.integers(2, 8),
)
def test_ranks_do_not_matter(program, tokens, top_k, experts, blocks, ranks):
    alone, shared = swaps(program, [(tokens, top_k, experts, 128 * blocks, r) for r in (1, ranks)])
    assert alone == shared


def test_decode_and_prefill(program):
    """The shapes that matter most, as one rank of eight: decode is swapAB's, prefill is not."""
    flash, pro = (6, 32, 2048, 1), (6, 48, 3072, 1)
    calls = [(tokens, *shape) for shape in (flash, pro) for tokens in (1, 128, 512, 8192)]
    assert swaps(program, calls) == [True, True, False, False] * 2
