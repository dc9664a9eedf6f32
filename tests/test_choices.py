"""What a launch is like, by problem and device: the function that decides it, compiled for the host, and its numbers."""

import re
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.native_program import CUDA, compile_program

DOCS = CUDA.parent.parent / "docs"
LOG = [DOCS / "performance-log.md", *sorted((DOCS / "log").glob("*.md"))]
THRESHOLDS = CUDA / "layout" / "thresholds.h"


class Problem(NamedTuple):
    tokens: int
    top_k: int
    hidden: int
    inter: int
    experts: int
    ranks: int = 1
    has_peers: bool = False
    format: int = 0  # as the enumeration in layout/weight_format.h counts them
    order: int = 0  # as OperandOrder in layout/problem.h counts them


MXFP4 = 2
SWAPPED, NORMAL = 1, 2


class Device(NamedTuple):
    sms: int = 132
    ctas: int = 132
    clusters: int = 66
    bytes_per_microsecond: int = 3_352_320


class Choice(NamedTuple):
    swap: bool
    cluster_ctas: int
    gathers_rows: bool
    assembles_images: bool
    activations_stay: bool
    bytes_in_flight: int
    ctas_per_sm: int = 1
    has_lone_token: bool = False


H100, H200 = Device(), Device(bytes_per_microsecond=4_916_736)
KB = 1024


def flash(tokens, **changes):
    return Problem(tokens, 6, 4096, 2048, 32)._replace(**changes)


def pro(tokens, **changes):
    return Problem(tokens, 6, 7168, 3072, 48)._replace(**changes)


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """From (problem, device) pairs to numbers."""
    source = CUDA / "host" / "choices.cc"
    program = compile_program(tmp_path_factory.mktemp("native"), "choices_test", source)

    def numbers_of(calls):
        lines = program("\n".join(" ".join(str(int(n)) for n in (*problem, *device)) for problem, device in calls))
        return [list(map(int, line.split())) for line in lines.splitlines()]

    return numbers_of


@pytest.fixture(scope="module")
def choose(ask):
    """From (problem, device) pairs to choices."""
    return lambda calls: [
        Choice(bool(n[0]), n[1], bool(n[2]), bool(n[3]), bool(n[4]), n[5], n[6], bool(n[7])) for n in ask(calls)
    ]


# Every branch, at its edges. By problem and device: swap, cluster_ctas, gathers_rows, assembles_images,
# activations_stay, bytes_in_flight.
CASES = {
    "decode": (flash(8), H100, (True, 1, False, False, False, 64 * KB)),
    "decode, a faster memory": (flash(8), H200, (True, 1, False, False, False, 74496)),
    "swapAB's last": (flash(149), H100, (True, 1, False, False, False, 64 * KB)),
    "normal's first": (flash(150), H100, (False, 1, True, False, True, 64 * KB)),
    "swapAB's last, many units": (pro(144), H100, (True, 1, False, False, False, 64 * KB)),
    "normal's first, too many bytes to stay": (pro(145), H100, (False, 1, True, False, False, 64 * KB)),
    "waits for memory": (flash(597), H100, (False, 1, True, False, True, 64 * KB)),
    "multiplies longer": (flash(598), H100, (False, 1, False, False, False, 64 * KB)),
    "waits for a faster memory": (flash(405), H200, (False, 1, True, False, True, 74496)),
    "multiplies longer, a faster memory": (flash(406), H200, (False, 1, False, False, False, 74496)),
    "a memory that nobody knows": (
        flash(597),
        H100._replace(bytes_per_microsecond=0),
        (False, 1, True, False, True, 64 * KB),
    ),
    "... multiplies longer": (
        flash(598),
        H100._replace(bytes_per_microsecond=0),
        (False, 1, False, False, False, 64 * KB),
    ),
    "a group of one writes rows where they are used": (
        flash(200, has_peers=True),
        H100,
        (False, 1, False, False, True, 64 * KB),
    ),
    "the last whose rows are sent": (
        flash(341, ranks=8, has_peers=True),
        H100,
        (False, 1, True, False, True, 64 * KB),
    ),
    "the first whose rows are not": (
        flash(342, ranks=8, has_peers=True),
        H100,
        (False, 1, False, False, True, 64 * KB),
    ),
    "fewer units than SMs send no rows": (
        Problem(100, 8, 2048, 768, 16, ranks=8, has_peers=True),
        H100._replace(sms=96),
        (False, 1, False, False, True, 69840),
    ),
    "fewer units than SMs": (Problem(100, 8, 2048, 768, 16), H100, (False, 1, False, False, True, 64 * KB)),
    "... of this device": (Problem(100, 8, 2048, 768, 16), H100._replace(sms=96), (False, 1, True, False, True, 69840)),
    "alone": (flash(1023), H100, (False, 1, False, False, False, 64 * KB)),
    "clusters": (flash(1024), H100, (False, 2, False, False, False, 64 * KB)),
    "an odd number of CTAs": (flash(1024), H100._replace(ctas=131), (False, 1, False, False, False, 64 * KB)),
    "clusters that do not all run": (flash(1024), H100._replace(clusters=65), (False, 1, False, False, False, 64 * KB)),
    "the last whose images are written": (
        flash(1365, ranks=8, has_peers=True),
        H100,
        (False, 2, False, False, False, 64 * KB),
    ),
    "the first whose images are assembled": (
        flash(1366, ranks=8, has_peers=True),
        H100,
        (False, 2, False, True, False, 64 * KB),
    ),
    "... not on one rank": (flash(8192), H100, (False, 2, False, False, False, 64 * KB)),
    "... never of decoded weights": (
        flash(8192, ranks=8, has_peers=True, format=MXFP4),
        H100,
        (False, 2, False, False, False, 65536),
    ),
}


@pytest.mark.parametrize("problem, device, wanted", CASES.values(), ids=CASES)
def test_every_branch(choose, problem, device, wanted):
    assert choose([(problem, device)]) == [Choice(*wanted)]


@pytest.mark.parametrize(
    "experts, inter, most",
    [(16, 768, 46), (16, 1536, 34), (32, 2048, 28), (32, 4096, 28), (33, 4096, 18), (48, 3072, 18)],
    ids=["below a unit per SM", "below two", "below eight", "eight less a bit", "eight", "more"],
)
def test_where_swap_ends(choose, experts, inter, most):
    """The routes per expert of docs/kernel.md, exactly."""
    calls = [(Problem(tokens, 1, 1024, inter, experts), H100) for tokens in (most * experts, most * experts + 1)]
    assert [choice.swap for choice in choose(calls)] == [True, False]


@pytest.mark.parametrize(
    "problem, per_sm",
    [
        (flash(1), 1),  # 192 gate/up units
        (flash(2), 2),
        (flash(160), 2),  # 960 routes for 32 experts
        (flash(161), 1),
        (flash(160, ranks=8, has_peers=True), 2),
        (flash(2, experts=11), 2),  # 352 units
        (flash(9, experts=10), 1),  # 320, one chunk for each expert
        (pro(1), 1),
        (pro(2), 2),
        (pro(240), 2),
        (pro(241), 1),
        (Problem(16, 8, 2048, 768, 16), 1),  # Qwen3-30B: 192
        (Problem(11, 3, 2048, 640, 33), 2),  # 330
        (Problem(8, 4, 2048, 640, 33), 1),  # 320
        (flash(8, order=SWAPPED), 1),
        (flash(8, order=NORMAL), 1),
    ],
)
@pytest.mark.parametrize("device", [H100, H200])
def test_where_two_ctas_share_an_sm(ask, choose, problem, per_sm, device):
    (decoded,) = choose([(problem._replace(format=MXFP4), device)])
    assert decoded.ctas_per_sm == per_sm
    assert decoded.bytes_in_flight == {H100: 64 * KB, H200: 74496}[device] // per_sm
    assert ask([(problem._replace(format=MXFP4), device)])[0][-1] == per_sm * 132
    assert all(choice.ctas_per_sm == 1 for choice in choose([(problem._replace(format=f), device) for f in (0, 1)]))


@pytest.mark.parametrize(
    "problem, lone",
    [
        (flash(1), True),
        (flash(1, has_peers=True), False),  # other ranks' tokens come as images
        (flash(2), False),
        (pro(1), True),
        (pro(1, top_k=7), False),  # 336 gate/up units: two CTAs on an SM, which have no room for it
        (flash(1, top_k=8, inter=1024), True),
        (flash(1, top_k=9, inter=1024), False),  # an expert could be named nine times
        (flash(1, hidden=8192), True),
        (flash(1, hidden=8320), False),
        (flash(1, order=NORMAL), False),
        (flash(1, order=SWAPPED), True),  # the last launch of a call of many
    ],
)
def test_where_each_cta_quantises_a_lone_token(choose, problem, lone):
    calls = [(problem._replace(format=f), H200) for f in (MXFP4, 0, 1)]
    assert [choice.has_lone_token for choice in choose(calls)] == [lone, False, False]


problems = st.builds(
    Problem,
    tokens=st.integers(1, 1 << 20),
    top_k=st.integers(1, 32),
    hidden=st.integers(1, 64).map(lambda blocks: 128 * blocks),
    inter=st.integers(1, 64).map(lambda blocks: 128 * blocks),
    experts=st.integers(1, 1024),
    ranks=st.just(1),
    has_peers=st.just(False),
    format=st.just(0),
    order=st.just(0),
)
devices = st.builds(
    Device,
    sms=st.integers(16, 256),
    ctas=st.integers(16, 256),
    clusters=st.integers(0, 128),
    bytes_per_microsecond=st.one_of(st.just(0), st.integers(1_000_000, 20_000_000)),
)


@settings(deadline=None, max_examples=50)
@given(problem=problems, device=devices, tokens=st.lists(st.integers(1, 1 << 20), min_size=2, max_size=20))
def test_more_tokens_never_turn_back(choose, problem, device, tokens):
    choices = choose([(problem._replace(tokens=t), device) for t in sorted(tokens)])
    normal = [choice for choice in choices if not choice.swap]
    swap = [choice.swap for choice in choices]
    assert swap == sorted(swap, reverse=True)
    for field in ("gathers_rows", "activations_stay"):
        values = [getattr(choice, field) for choice in normal]
        assert values == sorted(values, reverse=True), field
    sizes = [choice.cluster_ctas for choice in choices]
    assert sizes == sorted(sizes)
    # Beyond 56 routes, the chunk's limit, most experts would have two chunks.
    for t, choice in zip(sorted(tokens), choices, strict=True):
        assert not (choice.swap and t * problem.top_k > 56 * problem.experts)


@settings(deadline=None, max_examples=50)
@given(problem=problems, device=devices, has_peers=st.booleans())
def test_what_goes_together(choose, problem, device, has_peers):
    (choice,) = choose([(problem._replace(has_peers=has_peers), device)])
    if choice.swap:
        assert choice[1:5] == (1, False, False, False)
    if choice.cluster_ctas == 2:
        assert device.ctas % 2 == 0 and device.ctas <= 2 * device.clusters
        assert not choice.gathers_rows, "rows are gathered for a CTA that is alone"
    assert not (choice.gathers_rows and choice.assembles_images), "one warp would have to do both"
    if choice.gathers_rows:
        assert problem.experts * (problem.inter // 128) >= (132 if has_peers else device.sms)
    assert choice.bytes_in_flight >= 64 * KB
    (faster,) = choose([(problem, device._replace(bytes_per_microsecond=2 * device.bytes_per_microsecond))])
    assert faster.bytes_in_flight >= choice.bytes_in_flight


@settings(deadline=None, max_examples=50)
@given(problem=problems, device=devices, ranks=st.integers(2, 8), other=devices)
def test_ranks_and_devices_do_not_change_the_orientation(choose, problem, device, ranks, other):
    """All ranks of a group, and whoever sizes the scratch memory of a program without a GPU, come to the same."""
    calls = [(problem, device), (problem._replace(ranks=ranks, has_peers=True), device), (problem, other)]
    assert len({choice.swap for choice in choose(calls)}) == 1


@settings(deadline=None, max_examples=50)
@given(problem=problems, device=devices, other=devices)
def test_all_ranks_have_images_of_one_kind(choose, problem, device, other):
    """Whatever their devices: one rank's tokens are looked for where the other one has put them."""
    problem = problem._replace(ranks=2, has_peers=True)
    choices = choose([(problem, device), (problem, other)])
    assert len({(choice.assembles_images, choice.gathers_rows) for choice in choices}) == 1


@settings(deadline=None, max_examples=50)
@given(problem=problems, device=devices, format=st.integers(0, MXFP4), has_peers=st.booleans())
def test_ctas_of_a_launch_run_at_the_same_time(ask, problem, device, format, has_peers):
    ((_, cluster_ctas, *_, per_sm, _, ctas),) = ask([(problem._replace(format=format, has_peers=has_peers), device)])
    if cluster_ctas == 1:
        assert ctas == per_sm * device.ctas
    else:
        assert ctas == device.ctas and ctas % 2 == 0 and ctas <= 2 * device.clusters


@settings(deadline=None, max_examples=50)
@given(problem=problems, device=devices, ranks=st.integers(2, 8), other=devices)
def test_decoded_weights_have_one_orientation_on_all_devices(choose, problem, device, ranks, other):
    """The token tile follows from it, and by that ranks find places in each other's memory."""
    problem = problem._replace(format=MXFP4)
    calls = [(problem, device), (problem._replace(ranks=ranks, has_peers=True), device), (problem, other)]
    assert len({(choice.swap, choice.ctas_per_sm) for choice in choose(calls)}) == 1


@settings(deadline=None, max_examples=50)
@given(problem=problems, device=devices, format=st.integers(0, MXFP4), has_peers=st.booleans())
def test_batch_invariant_calls_have_one_orientation(choose, problem, device, format, has_peers):
    """However few tokens there are; the rest is as the rule has it for calls that it puts there anyway."""
    problem = problem._replace(format=format, has_peers=has_peers)
    by_rule, invariant = choose([(problem, device), (problem._replace(order=NORMAL), device)])
    assert not invariant.swap
    assert by_rule.swap or invariant == by_rule


def test_decode_and_prefill(choose):
    """The shapes that matter most, as one rank of eight: decode is swapAB's, prefill is not."""
    calls = [(model(tokens), H100) for model in (flash, pro) for tokens in (1, 128, 512, 8192)]
    assert [choice.swap for choice in choose(calls)] == [True, True, False, False] * 2


def test_the_module_tells_it_too():
    """For tests that have to know which path a call takes, whatever the rule is."""
    core = pytest.importorskip("jax_megamoe._core")
    if not hasattr(core, "launch_choice"):
        pytest.skip("jax_megamoe._core has no launch_choice: build it anew")
    found = core.launch_choice(150, 6, 4096, 2048, 32, "fp8_block", 1, num_sms=132, bytes_per_microsecond=3_352_320)
    wanted = Choice(*CASES["normal's first"][2])
    names = (
        "swap_operands",
        "cluster_ctas",
        "gathers_rows",
        "assembles_images",
        "activations_stay",
        "weight_bytes_in_flight",
        "ctas_per_sm",
        "has_lone_token",
    )
    assert found == dict(zip(names, wanted, strict=True))
    device = {"num_sms": 132, "bytes_per_microsecond": 3_352_320}
    assert core.launch_choice(150, 6, 4096, 2048, 32, "fp8_channel", 1, **device) == found

    assert not core.launch_choice(1, 6, 4096, 2048, 32, "fp8_block", 1, **device, batch_invariant=True)["swap_operands"]

    # Weights that are decoded: swapAB serves as many routes per expert whatever the units, and rows are not gathered.
    def decoded(tokens, **of_device):
        return core.launch_choice(tokens, 6, 4096, 2048, 32, "mxfp4", 1, **{**device, **of_device})

    assert [decoded(tokens)["swap_operands"] for tokens in (250, 251, 8192)] == [True, False, False]
    assert [decoded(tokens)["ctas_per_sm"] for tokens in (1, 2, 160, 161, 251)] == [1, 2, 2, 1, 1]
    assert [decoded(tokens)["cluster_ctas"] for tokens in (251, 1023, 1024)] == [1, 1, 2]
    assert not decoded(251)["gathers_rows"]
    assert [decoded(tokens)["has_lone_token"] for tokens in (1, 2)] == [True, False]
    assert not decoded(8192, num_sms=131)["swap_operands"] and decoded(8192, num_sms=131)["cluster_ctas"] == 1


# The table.


def test_every_threshold_says_its_unit_and_where_it_was_measured():
    headings = {heading for page in LOG for heading in re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)}
    for block in THRESHOLDS.read_text().split("\n\n"):
        names = re.findall(r"^constexpr [\w ]+ (k\w+)", block, re.MULTILINE)
        if not names:
            continue
        comment = " ".join(line.removeprefix("//").strip() for line in block.splitlines() if line.startswith("//"))
        found = re.search(r'Unit: [^.]+\. Measured: "([^"]+)"\.$', comment)
        assert found, f"{names}: wanted a comment that ends with Unit and Measured"
        assert found[1] in headings, f"{names}: the log (docs/performance-log.md) has no section {found[1]!r}"


def test_every_threshold_is_used():
    code = "".join(path.read_text() for path in CUDA.rglob("*") if path.is_file() and path != THRESHOLDS)
    names = re.findall(r"^constexpr [\w ]+ (k\w+)", THRESHOLDS.read_text(), re.MULTILINE)
    assert len(names) > 12
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_the_number_of_sms_is_asked_of_the_device():
    for path in CUDA.rglob("*"):
        if path.is_file() and path != THRESHOLDS:
            code = re.sub(r"//.*", "", path.read_text())
            assert not re.search(r"\b132\b", code), f"{path}: wanted Device::num_sms"
