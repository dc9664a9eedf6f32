"""The ranks of an expert group on one GPU, each with a part of its SMs: the whole protocol, against one rank bit by bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.cases import LARGEST_MODELS, ODD_ROUTINGS, SHARED
from tests.support.compare import bits, difference
from tests.support.problems import Sizes, make_inputs, make_problem, make_weights
from tests.support.skips import gpu_tests, why_no_hopper, why_no_testing
from tests.support.virtual_ranks import assert_as_one_rank, on_virtual_ranks, one_rank

pytestmark = gpu_tests(why_no_hopper() or why_no_testing())


SENT_AS_ROWS = Sizes(hidden=256, inter=2048, num_experts=64, top_k=4)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 5, 16, 128, 150, 800])
def test_same_as_one_rank(num_ranks, tokens):
    assert_as_one_rank(tokens, num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 8])
@pytest.mark.parametrize("routing", ODD_ROUTINGS)
@pytest.mark.parametrize("tokens", [3, 140])
def test_routings(num_ranks, routing, tokens):
    assert_as_one_rank(tokens, num_ranks, routing)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_token_wanted_by_a_hundred_times_as_many_pairs(num_ranks):
    """All pairs but one are on one rank: loads differ by more than a hundred times."""
    x, weights, ids, topk_weights = make_problem(32 * num_ranks, SHARED)
    ids = (ids % (16 // num_ranks)).at[5, 2].set(15)
    wanted, wanted_load = one_rank(x, weights, ids, topk_weights)
    y, load = on_virtual_ranks(x, weights, ids, topk_weights, num_ranks=num_ranks)
    np.testing.assert_array_equal(load, wanted_load)
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(wanted, np.float32), rtol=0.02, atol=0.02)
    assert difference(y, wanted) < 1e-5


@pytest.mark.parametrize("options", [{}, {"ctas": 32, "seed": 5, "late_ctas": 6}], ids=["", "late CTAs and pauses"])
@pytest.mark.parametrize(("hidden", "routing"), [(128, "one"), (256, "uniform"), (1152, "masked"), (1536, "uniform")])
def test_images_go_round_the_rings(hidden, routing, options):
    """More chunks than both rings have places for, of experts with more than one run of them; few and many planes."""
    sizes, tokens = Sizes(hidden=hidden, inter=512, num_experts=8, top_k=4), 20_000
    core = pytest.importorskip("jax_megamoe._core")
    choice = core.launch_choice(tokens, 4, hidden, 512, 4, "fp8_block", 2, num_sms=64, bytes_per_microsecond=0)
    assert choice["assembles_images"]
    assert_as_one_rank(tokens, 2, routing, sizes, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"ctas": 32, "seed": 5, "late_ctas": 6}, {"ctas": 16, "late_ctas": 15}],
    ids=["", "late CTAs and pauses", "all CTAs but one are late"],
)
@pytest.mark.parametrize("weight_format", ["fp8_block", "fp8_channel"])
@pytest.mark.parametrize(
    ("hidden", "tokens", "num_ranks", "routing"),
    [(128, 250, 2, "one"), (1152, 247, 2, "masked"), (1536, 250, 4, "uniform")],
)
def test_rows_over_the_wires(hidden, tokens, num_ranks, routing, weight_format, options):
    """A token goes to each rank once, as a row, whatever the number of its experts there."""
    sizes = Sizes(hidden=hidden, inter=2048, num_experts=16 * num_ranks, top_k=4)
    core = pytest.importorskip("jax_megamoe._core")
    num_sms = options.get("ctas", 132 // num_ranks)
    choice = core.launch_choice(
        tokens, sizes.top_k, hidden, 2048, 16, weight_format, num_ranks, num_sms=num_sms, bytes_per_microsecond=0
    )
    assert choice["gathers_rows"] and not choice["swap_operands"]
    assert_as_one_rank(tokens, num_ranks, routing, sizes, weight_format, **options)


@pytest.mark.parametrize(("hidden", "inter"), LARGEST_MODELS.values(), ids=LARGEST_MODELS)
def test_model_shapes(hidden, inter):
    assert_as_one_rank(16, 8, sizes=Sizes(hidden, inter, num_experts=8, top_k=6))


@pytest.mark.parametrize(("tokens", "repeats"), [(7, 50), (200, 3)])  # single thread blocks, and clusters of two
def test_stress(tokens, repeats):
    """Many launches of one program with pauses of random length, and another routing each time."""
    num_ranks, rounds = 4, 64
    weights = make_weights(SHARED)
    calls = [make_inputs(tokens * num_ranks, SHARED, seed=seed) for seed in range(rounds)]
    x, ids, topk_weights = (jnp.stack(values) for values in zip(*calls, strict=True))
    wanted = jax.lax.map(lambda call: one_rank(call[0], weights, call[1], call[2])[0], (x, ids, topk_weights))

    @jax.jit
    def run(x, ids, topk_weights):
        call = functools.partial(on_virtual_ranks, num_ranks=num_ranks, ctas=6, seed=77)
        return jax.lax.map(lambda c: call(c[0], weights, c[1], c[2])[0], (x, ids, topk_weights))

    for _ in range(repeats):
        got = run(x, ids, topk_weights)
        np.testing.assert_array_equal(bits(got), bits(wanted))


# Tokens of all ranks: swapAB, images, rows.
@pytest.mark.parametrize(("tokens", "sizes"), [(16, SHARED), (800, SHARED), (1000, SENT_AS_ROWS)])
def test_a_missing_rank_ends_in_an_error(tokens, sizes):
    problem = make_problem(tokens, sizes)
    call = functools.partial(on_virtual_ranks, *problem, num_ranks=4, present=3, ctas=6, timeout_microseconds=200_000)
    y, _ = call()
    assert np.isnan(np.asarray(y[: tokens * 3 // 4], np.float32)).all()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"waited in vain for rank 3, phase routing, epoch 1"):
        jax.block_until_ready(call())
    # The process goes on, and so do other calls.
    assert_as_one_rank(5, 2)


@pytest.mark.parametrize(("tokens", "sizes"), [(800, SHARED), (1000, SENT_AS_ROWS)])
def test_a_missing_rank_while_ctas_are_late(tokens, sizes):
    """Nobody writes over what those who take the late CTAs' shares over have noted."""
    problem = make_problem(tokens, sizes)
    call = functools.partial(
        on_virtual_ranks, *problem, num_ranks=4, present=3, ctas=16, late_ctas=15, timeout_microseconds=200_000
    )
    y, _ = call()
    assert np.isnan(np.asarray(y[: tokens * 3 // 4], np.float32)).all()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"waited in vain for rank 3"):
        jax.block_until_ready(call())
    assert_as_one_rank(5, 2)


@pytest.mark.parametrize(("tokens", "sizes"), [(16, SHARED), (800, SHARED), (1000, SENT_AS_ROWS)])
@pytest.mark.parametrize("odd_rank", [0, 2])
def test_ranks_that_disagree_on_the_shape_end_in_an_error(odd_rank, tokens, sizes):
    """One rank's words have another tag; all else is right, so that without the tags nobody would notice."""
    problem = make_problem(tokens, sizes)
    call = functools.partial(
        on_virtual_ranks, *problem, num_ranks=4, odd_rank=odd_rank, ctas=6, timeout_microseconds=200_000
    )
    y, _ = call()
    assert np.isnan(np.asarray(y, np.float32)).all()
    # Whoever's time is over first says so: the odd one of another, or another of the odd one.
    waited = f"{odd_rank} waited in vain for rank [^{odd_rank}]|[^{odd_rank}] waited in vain for rank {odd_rank}"
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"rank ({waited}), phase routing, epoch 1:"):
        jax.block_until_ready(call())
    assert_as_one_rank(4, 4)
