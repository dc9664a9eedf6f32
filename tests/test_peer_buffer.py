"""Where things lie in the buffers that the ranks of a group share, compiled for the host."""

import numpy as np
import pytest

from tests.support.native_program import CUDA, compile_program, cuda_include

MOST_SCRATCH = 4_000_000_000
BY_RULE, NORMAL = 0, 2  # as OperandOrder in layout/problem.h counts them
FP8_BLOCK, MXFP4 = 0, 2
# T, k, H, I, E of a rank, ranks
MODELS = [
    (tokens, k, h, i, e, 8)
    for tokens in (1, 128, 512, 8192)
    for k, h, i, e in ((6, 4096, 2048, 32), (6, 7168, 3072, 48))
]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """For each problem: tokens of the largest launch, local scratch, and (bytes, fits, ids, ids, header, workspace, sizes) twice."""
    program = compile_program(tmp_path_factory.mktemp("native"), "peer_buffer_test", CUDA / "host" / "limits.cc")

    def run(problems, order=BY_RULE, weight_format=FP8_BLOCK):
        text = "\n".join(" ".join(map(str, (*problem, order, weight_format))) for problem in problems)
        return [line.split() for line in program(text).splitlines()]

    return run


def random_problems(count):
    random = np.random.default_rng(0)
    for _ in range(count):
        ranks = int(random.choice([1, 2, 3, 8, 32]))
        experts = int(random.integers(1, 1024 // ranks + 1))
        tokens = int(2 ** random.uniform(0, 16))
        sizes = (128 * int(2 ** random.uniform(0, 7)) for _ in range(2))
        yield (tokens, int(random.integers(1, 33)), *sizes, experts, ranks)


@pytest.mark.parametrize("order", [BY_RULE, NORMAL], ids=["by rule", "batch-invariant"])
@pytest.mark.parametrize("weight_format", [FP8_BLOCK, MXFP4], ids=["fp8", "mxfp4"])
def test_parts_fit_and_do_not_overlap(layouts, order, weight_format):
    problems = [*MODELS, *random_problems(300)]
    for problem, line in zip(problems, layouts(problems, order, weight_format), strict=True):
        numbers = list(map(int, line))
        for size, fits, *offsets, ids_bytes, header_bytes, shared_bytes in (numbers[2:11], numbers[11:20]):
            assert fits, problem
            first, second, header, workspace = offsets
            assert 0 <= first <= first + ids_bytes <= second <= second + ids_bytes <= header, problem
            assert header + header_bytes <= workspace and workspace + shared_bytes <= size, problem
            assert not any(offset % 1024 for offset in offsets)


def test_ids_lie_where_the_size_of_the_buffer_says(layouts):
    """And nothing else of the problem: programs of different shapes share a buffer."""
    (wide,), (narrow,) = layouts([(64, 6, 4096, 2048, 32, 8)]), layouts([(64, 6, 4096, 128, 32, 8)])
    assert wide[2] == narrow[2] and wide[4:8] == narrow[4:8]


def test_scratch_is_bounded_and_launches_are_as_few_as_can_be(layouts):
    problems = [*MODELS, *random_problems(300)]
    for problem, line in zip(problems, layouts(problems), strict=True):
        tokens, local, symmetric = int(line[0]), int(line[1]), int(line[2])
        if problem[5] > 1:
            assert local + symmetric <= MOST_SCRATCH or tokens == 1, problem
        assert 1 <= tokens <= problem[0]
    launches = {
        problem: -(-problem[0] // int(line[0])) for problem, line in zip(problems, layouts(problems), strict=True)
    }
    assert launches[(8192, 6, 7168, 3072, 48, 8)] == 1
    assert launches[(8192, 6, 4096, 2048, 32, 8)] == 1
    assert launches[(512, 6, 7168, 3072, 48, 8)] == 1


@pytest.mark.parametrize("order", [BY_RULE, NORMAL], ids=["by rule", "batch-invariant"])
@pytest.mark.parametrize("weight_format", [FP8_BLOCK, MXFP4], ids=["fp8", "mxfp4"])
def test_a_buffer_holds_smaller_problems_too(layouts, order, weight_format):
    """Also those just below the numbers of tokens from which on chunks are larger, or other ranks write no images."""
    for k, h, i, e, ranks in (
        (6, 4096, 2048, 32, 8),
        (6, 7168, 3072, 48, 8),
        (8, 2048, 768, 16, 2),
        (1, 128, 128, 1, 2),
    ):
        # Routes per expert: halves' last, swapAB's in all its cases, what other ranks write.
        edges = [limit * e // k for limit in (18, 28, 30, 34, 46, 52, 256)]
        tokens = {t for edge in edges for t in (edge - 1, edge, edge + 1) if t > 0}
        tokens |= {1, 64, 300 * e // k, 400 * e // k, 2048}
        lines = layouts([(t, k, h, i, e, ranks) for t in sorted(tokens)], order, weight_format)
        sizes = [int(line[2]) for line in lines]
        assert sizes == sorted(sizes)


def test_many_tokens_need_a_fraction_of_their_images(layouts):
    """Flash over eight ranks, 8192 tokens each: 1.6 GB of images, were they all there at a time."""
    ((_, local, symmetric, *_),) = layouts([(8192, 6, 4096, 2048, 32, 8)])
    assert int(local) + int(symmetric) < 1_400_000_000


@pytest.mark.parametrize(
    "problem",
    [(1, 1, 128, 128, 1, 33), (1, 1, 128, 128, 600, 2), (1, 1, 65664, 128, 1, 2)],
    ids=["ranks", "experts", "hidden size"],
)
def test_what_a_group_cannot_serve(layouts, problem):
    assert layouts([problem]) == [["unsupported"]]


def test_ranks_that_disagree_on_a_call_have_other_tags(tmp_path):
    """On the orientation too: it says where tokens lie in a rank's memory."""
    tags = compile_program(tmp_path, "call_tag_test", CUDA / "host" / "peers.cc", flags=["-isystem", cuda_include()])
    call = [64, 6, 4096, 2048, 32, 8, BY_RULE, 77]
    others = [[*call[:i], call[i] + 2, *call[i + 1 :]] for i in range(len(call))]  # BY_RULE + 2 is NORMAL
    found = tags("\n".join(" ".join(map(str, line)) for line in [call, call, *others])).split()
    assert found[0] == found[1] and len(set(found)) == 1 + len(others)
