"""The ranks of an expert group on one GPU, each with a part of its SMs: the whole protocol, against one rank bit by bit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from gpu.inputs import difference, make_inputs, make_weights
from gpu.needs import needs_hopper, needs_testing
from jax_megamoe.primitives import _library

pytestmark = [*needs_hopper, needs_testing]

CLAMP, FACTOR = 6.0, 1.5
one_rank: Any = jax.jit(
    functools.partial(mm.moe, activation_clamp=CLAMP, routed_scaling_factor=FACTOR, return_expert_load=True)
)


@functools.partial(
    jax.jit, static_argnames=("num_ranks", "present", "ctas", "seed", "timeout_microseconds", "odd_rank", "late_ctas")
)
def on_virtual_ranks(
    x,
    weights,
    ids,
    routing,
    *,
    num_ranks,
    present=None,
    ctas=None,
    seed=0,
    timeout_microseconds=30_000_000,
    odd_rank=-1,
    late_ctas=0,
):
    """`one_rank` with rank r having the r-th part of the tokens and of the experts.

    So many late CTAs of each rank, which `seed` chooses, begin only when all others have done their part.
    """
    core = _library._core
    assert core is not None
    scratch = core.peer_workspace_bytes(
        x.shape[0] // num_ranks,
        ids.shape[1],
        weights.hidden_size,
        weights.intermediate_size,
        weights.num_experts // num_ranks,
        num_ranks,
    )
    results = (
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((weights.num_experts,), jnp.int32),
        jax.ShapeDtypeStruct((num_ranks * scratch,), jnp.uint8),
    )
    leaves = (weights.gate_up, weights.gate_up_scale, weights.down, weights.down_scale)
    y, load, _ = jax.ffi.ffi_call("jax_megamoe.virtual_ranks.v1", results)(
        x,
        *leaves,
        ids,
        routing,
        jnp.int32(0),
        activation_clamp=np.float32(CLAMP),
        routed_scaling_factor=np.float32(FACTOR),
        num_ranks=np.int64(num_ranks),
        present=np.int64(present or num_ranks),
        ctas_per_rank=np.int64(ctas or 128 // num_ranks),
        delay_seed=np.int64(seed),
        timeout_microseconds=np.int64(timeout_microseconds),
        odd_rank=np.int64(odd_rank),
        late_ctas=np.int64(late_ctas),
    )
    return y, load


def compare(tokens_per_rank, num_ranks, routing="uniform", hidden=512, inter=384, num_experts=16, top_k=4, **options):
    weights = make_weights(num_experts, hidden, inter)
    x, ids, probs = make_inputs(tokens_per_rank * num_ranks, hidden, num_experts, top_k, routing)
    wanted, wanted_load = one_rank(x, weights, ids, probs)
    for _ in range(3):
        y, load = on_virtual_ranks(x, weights, ids, probs, num_ranks=num_ranks, **options)
        np.testing.assert_array_equal(load, wanted_load)
        np.testing.assert_array_equal(np.asarray(y).view(np.uint16), np.asarray(wanted).view(np.uint16))


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 5, 16, 128, 150, 800])
def test_same_as_one_rank(num_ranks, tokens):
    compare(tokens, num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 8])
@pytest.mark.parametrize("routing", ["one", "masked", "none"])
@pytest.mark.parametrize("tokens", [3, 140])
def test_routings(num_ranks, routing, tokens):
    compare(tokens, num_ranks, routing)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_token_wanted_by_a_hundred_times_as_many_pairs(num_ranks):
    """All pairs but one are on one rank: loads differ by more than a hundred times."""
    weights = make_weights(16, 512, 384)
    x, ids, probs = make_inputs(32 * num_ranks, 512, 16, 4)
    ids = (ids % (16 // num_ranks)).at[5, 2].set(15)
    wanted, wanted_load = one_rank(x, weights, ids, probs)
    y, load = on_virtual_ranks(x, weights, ids, probs, num_ranks=num_ranks)
    np.testing.assert_array_equal(load, wanted_load)
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(wanted, np.float32), rtol=0.02, atol=0.02)
    assert difference(y, wanted) < 1e-5


@pytest.mark.parametrize(("hidden", "inter"), [(4096, 2048), (7168, 3072)])
def test_model_shapes(hidden, inter):
    compare(16, 8, hidden=hidden, inter=inter, num_experts=8, top_k=6)


@pytest.mark.parametrize(("tokens", "repeats"), [(7, 50), (200, 3)])  # single thread blocks, and clusters of two
def test_stress(tokens, repeats):
    """Many launches of one program with pauses of random length, and another routing each time."""
    num_ranks, num_experts, top_k, rounds = 4, 16, 4, 64
    weights = make_weights(num_experts, 512, 384)
    calls = [make_inputs(tokens * num_ranks, 512, num_experts, top_k, seed=seed) for seed in range(rounds)]
    x, ids, probs = (jnp.stack(values) for values in zip(*calls, strict=True))
    wanted = jax.lax.map(lambda call: one_rank(call[0], weights, call[1], call[2])[0], (x, ids, probs))

    @jax.jit
    def run(x, ids, probs):
        call = functools.partial(on_virtual_ranks, num_ranks=num_ranks, ctas=6, seed=77)
        return jax.lax.map(lambda c: call(c[0], weights, c[1], c[2])[0], (x, ids, probs))

    for _ in range(repeats):
        got = run(x, ids, probs)
        np.testing.assert_array_equal(np.asarray(got).view(np.uint16), np.asarray(wanted).view(np.uint16))


@pytest.mark.parametrize("tokens", [16, 800])
def test_a_missing_rank_ends_in_an_error(tokens):
    weights = make_weights(16, 512, 384)
    x, ids, probs = make_inputs(tokens, 512, 16, 4)
    call = functools.partial(
        on_virtual_ranks, x, weights, ids, probs, num_ranks=4, present=3, ctas=6, timeout_microseconds=200_000
    )
    y, _ = call()
    assert np.isnan(np.asarray(y[: tokens * 3 // 4], np.float32)).all()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"waited in vain for rank 3, phase routing, epoch 1"):
        jax.block_until_ready(call())
    # The process goes on, and so do other calls.
    compare(5, 2)


@pytest.mark.parametrize("tokens", [16, 800])
@pytest.mark.parametrize("odd_rank", [0, 2])
def test_ranks_that_disagree_on_the_shape_end_in_an_error(odd_rank, tokens):
    """One rank's words have another tag; all else is right, so that without the tags nobody would notice."""
    weights = make_weights(16, 512, 384)
    x, ids, probs = make_inputs(tokens, 512, 16, 4)
    call = functools.partial(
        on_virtual_ranks, x, weights, ids, probs, num_ranks=4, odd_rank=odd_rank, ctas=6, timeout_microseconds=200_000
    )
    y, _ = call()
    assert np.isnan(np.asarray(y, np.float32)).all()
    # Whoever's time is over first says so: the odd one of another, or another of the odd one.
    waited = f"{odd_rank} waited in vain for rank [^{odd_rank}]|[^{odd_rank}] waited in vain for rank {odd_rank}"
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"rank ({waited}), phase routing, epoch 1:"):
        jax.block_until_ready(call())
    compare(4, 4)
