"""The kernel with fewer SMs than CTAs: whoever else holds them, it makes progress with those that it has.

Another stream's kernel that holds SMs, two calls that share them, and virtual ranks of which most CTAs begin only when the
others have done all there is to do, or which have more of them than the GPU has SMs.
"""

import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compute_on import compute_on

import jax_megamoe as mm
from jax_megamoe.primitives import _library
from tests.support.cases import SHARED
from tests.support.compare import bits
from tests.support.problems import Problem, make_problem
from tests.support.skips import gpu_tests, unless, why_no_hopper, why_no_testing
from tests.support.virtual_ranks import assert_as_one_rank

pytestmark = gpu_tests(why_no_hopper())

moe: Any = jax.jit(mm.moe)
needs_testing = unless(why_no_testing())


def make_call(tokens: int, seed: int = 0) -> Problem:
    return make_problem(tokens, SHARED, seed=seed, weights_seed=seed)


@needs_testing
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("ctas", "milliseconds"), [(100, 50), (131, 50), (132, 50), (100, 2500)])
@pytest.mark.parametrize("tokens", [1, 128, 800])
def test_while_something_holds_sms(tokens, ctas, milliseconds):
    arguments = make_call(tokens)
    wanted = bits(moe(*arguments))
    begun = time.monotonic()
    _library._core.hold_sms(jax.devices("gpu")[0].local_hardware_id, ctas, milliseconds)  # type: ignore[union-attr]
    assert time.monotonic() - begun < 1, "hold_sms was to return when it has the SMs"
    for y in [moe(*arguments) for _ in range(10)]:
        np.testing.assert_array_equal(bits(y), wanted)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("tokens", [16, 800])
def test_two_calls_on_two_streams(tokens):
    one, other = make_call(tokens), make_call(tokens, seed=1)
    wanted = bits(moe(*one)), bits(moe(*other))
    # Stacked, since XLA of jax 0.12.0.1 cannot compile constants, such as the number of the only layer, that are operands
    # of a call on a stream of its own: their names are none of PTX.
    stacked: Any = [(x, mm.stack_experts([weights]), *rest) for x, weights, *rest in (one, other)]

    @jax.jit
    def both(one: Any, other: Any, layer: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        # Neither is XLA's own, whose work the others wait for.
        streams = [
            compute_on(compute_type=f"gpu_stream:{name}", out_memory_spaces=jax.memory.Space.Device)
            for name in ("collective", "1")
        ]
        results = []
        for _ in range(4):
            y = streams[0](lambda: mm.moe(*one, layer=layer))()  # noqa: B023
            other_y = streams[1](lambda: mm.moe(*other, layer=layer))()  # noqa: B023
            results.append((y, other_y))
            # The next two need both of these, so that XLA has them side by side, too. The operands are the same ones in fact.
            failed = jnp.isnan(y) | jnp.isnan(other_y)
            one, other = ((jnp.where(failed, y, x), *others) for x, *others in (one, other))
        return results

    for results in [both(*stacked, jnp.int32(0)) for _ in range(25)]:
        for pair in results:
            for y, expected in zip(pair, wanted, strict=True):
                np.testing.assert_array_equal(bits(y), expected)


@pytest.mark.timeout(60)
def test_calls_of_two_threads():
    calls = [make_call(tokens, seed) for seed, tokens in enumerate((16, 800))]
    wanted = [bits(moe(*call)) for call in calls]
    wrong = [0, 0]

    def run(which: int) -> None:
        for _ in range(10):
            results = [moe(*calls[which]) for _ in range(10)]
            wrong[which] += sum(not np.array_equal(bits(y), wanted[which]) for y in results)

    threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0]


@needs_testing
@pytest.mark.timeout(120)
@pytest.mark.parametrize("tokens", [1, 16, 150, 800])  # the last with clusters of two CTAs
@pytest.mark.parametrize("late", ["one", "three", "all but one"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_late_ctas(num_ranks, late, tokens):
    ctas = 128 // num_ranks
    assert_as_one_rank(tokens, num_ranks, ctas=ctas, late_ctas={"one": 1, "three": 3}.get(late, ctas - 1), seed=7)


@needs_testing
@pytest.mark.timeout(120)
@pytest.mark.parametrize("tokens", [1, 16, 150, 800])
@pytest.mark.parametrize(("num_ranks", "ctas"), [(1, 200), (2, 100)])  # on 132 SMs
def test_more_ctas_than_sms(num_ranks, ctas, tokens):
    assert_as_one_rank(tokens, num_ranks, ctas=ctas)
