"""The ranks of an expert group on one GPU, each with a part of its SMs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_megamoe as mm
from jax_megamoe.operands import Operands
from jax_megamoe.operands import Sizes as CallSizes
from jax_megamoe.primitives import _library
from jax_megamoe.weight_layout import Format
from tests.support.cases import SHARED
from tests.support.compare import bits
from tests.support.problems import Sizes, make_problem

CLAMP, FACTOR = 6.0, 1.5
one_rank: Any = jax.jit(
    functools.partial(mm.moe, activation_clamp=CLAMP, routed_scaling_factor=FACTOR, return_expert_load=True),
    static_argnames="batch_invariant",
)


@functools.partial(
    jax.jit,
    static_argnames=(
        "num_ranks",
        "present",
        "ctas",
        "seed",
        "timeout_microseconds",
        "odd_rank",
        "late_ctas",
        "batch_invariant",
    ),
)
def on_virtual_ranks(
    x,
    weights,
    ids,
    topk_weights,
    *,
    num_ranks,
    present=None,
    ctas=None,
    seed=0,
    timeout_microseconds=30_000_000,
    odd_rank=-1,
    late_ctas=0,
    batch_invariant=False,
):
    """`one_rank` with rank r having the r-th part of the tokens and of the experts.

    So many late CTAs of each rank, which `seed` chooses, begin only when all others have done their part.
    """
    scratch = _library.peer_workspace_bytes(
        CallSizes(
            x.shape[0] // num_ranks,
            ids.shape[1],
            weights.hidden_size,
            weights.intermediate_size,
            weights.num_experts // num_ranks,
            weights.format,
            batch_invariant,
        ),
        num_ranks,
    )
    results = (
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((weights.num_experts,), jnp.int32),
        jax.ShapeDtypeStruct((num_ranks * scratch,), jnp.uint8),
    )
    y, load, _ = jax.ffi.ffi_call("jax_megamoe.virtual_ranks.v1", results)(
        *Operands(x, weights.leaves, ids, topk_weights, jnp.int32(0)).row,
        activation_clamp=np.float32(CLAMP),
        routed_scaling_factor=np.float32(FACTOR),
        batch_invariant=np.int64(batch_invariant),
        num_ranks=np.int64(num_ranks),
        present=np.int64(present or num_ranks),
        ctas_per_rank=np.int64(ctas or 128 // num_ranks),
        delay_seed=np.int64(seed),
        timeout_microseconds=np.int64(timeout_microseconds),
        odd_rank=np.int64(odd_rank),
        late_ctas=np.int64(late_ctas),
    )
    return y, load


def assert_as_one_rank(
    tokens_per_rank: int,
    num_ranks: int,
    routing: str = "uniform",
    sizes: Sizes = SHARED,
    weight_format: Format = "fp8_block",
    batch_invariant: bool = False,
    **options: Any,
) -> None:
    """Three launches in a row have the bits of one rank with all tokens and experts."""
    problem = make_problem(tokens_per_rank * num_ranks, sizes, routing, weight_format=weight_format)
    wanted, wanted_load = one_rank(*problem, batch_invariant=batch_invariant)
    for _ in range(3):
        y, load = on_virtual_ranks(*problem, num_ranks=num_ranks, batch_invariant=batch_invariant, **options)
        np.testing.assert_array_equal(load, wanted_load)
        np.testing.assert_array_equal(bits(y), bits(wanted))
