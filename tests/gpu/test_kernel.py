"""The fused kernel against the reference, on a Hopper GPU: `python -m pytest -m gpu tests/gpu`."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from tests.support.cases import MODELS, ODD_ROUTINGS
from tests.support.compare import difference
from tests.support.layer_with_options import moe, reference
from tests.support.problems import Problem, Sizes, make_inputs, make_problem, make_weights
from tests.support.skips import gpu_tests, why_no_hopper

pytestmark = gpu_tests(why_no_hopper())

SMALL = Sizes(hidden=512, inter=256, num_experts=8, top_k=4)


def assert_is_the_references(problem: Problem) -> None:
    y, load = moe(*problem)
    wanted, wanted_load = reference(*problem)
    assert y.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(y, np.float32)).all()
    np.testing.assert_array_equal(load, wanted_load)
    assert difference(y, wanted) < 1e-4


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 16, 33, 64, 127, 128, 129, 200, 256, 1000, 8192])
def test_token_counts(tokens):
    assert_is_the_references(make_problem(tokens, Sizes(512, 384, 8, 4)))


@pytest.mark.parametrize("tokens", [1, 24, 128, 300])
@pytest.mark.parametrize(("hidden", "inter"), MODELS.values(), ids=MODELS)
def test_shapes(hidden, inter, tokens):
    assert_is_the_references(make_problem(tokens, Sizes(hidden, inter, 8, 6)))


@pytest.mark.parametrize("top_k", [1, 2, 6, 8, 32])
@pytest.mark.parametrize("tokens", [5, 128, 700])
def test_top_k(top_k, tokens):
    assert_is_the_references(make_problem(tokens, Sizes(256, 256, 16, top_k)))


@pytest.mark.parametrize("routing", ODD_ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 40, 128, 300])
def test_routings(routing, tokens):
    assert_is_the_references(make_problem(tokens, SMALL, routing))


@pytest.mark.parametrize("routing", ["uniform", "one", "masked"])
@pytest.mark.parametrize(("hidden", "inter"), [(640, 384), (512, 256)])
@pytest.mark.parametrize("tokens", [192, 260, 390, 700])
def test_experts_of_several_chunks(tokens, hidden, inter, routing):
    """From 192 routes per expert on, clusters of two thread blocks share weights; an odd number of tiles leaves one without work."""
    assert_is_the_references(make_problem(tokens, Sizes(hidden, inter, 4, 4), routing))


@pytest.mark.parametrize("routing", ["uniform", "one", "masked", "none"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inter", "experts", "top_k"), [(640, 512, 384, 48, 4), (300, 384, 128, 133, 32)]
)
def test_tokens_that_are_gathered_by_row(tokens, hidden, inter, experts, top_k, routing):
    """The normal orientation with up to 112 pairs per expert (76 on an H200) and a gate/up unit for each SM."""
    assert_is_the_references(make_problem(tokens, Sizes(hidden, inter, experts, top_k), routing))


@pytest.mark.parametrize("num_experts", [1, 3, 256, 1024])
def test_numbers_of_experts(num_experts):
    assert_is_the_references(make_problem(100, Sizes(128, 128, num_experts, 4)))


def test_a_call_whose_scratch_would_exceed_4_gb():
    """It becomes two launches; each token gets what it gets in a batch of its own."""
    x, weights, ids, topk_weights = make_problem(65536, Sizes(1024, 128, 8, 32))
    y, load = moe(x, weights, ids, topk_weights)
    np.testing.assert_array_equal(load, np.bincount(np.ravel(ids), minlength=8))
    for first in (0, 40000):
        part = slice(first, first + 1000)
        wanted, _ = moe(x[part], weights, ids[part], topk_weights[part])
        np.testing.assert_array_equal(np.asarray(y[part]).view(np.uint16), np.asarray(wanted).view(np.uint16))


def test_token_without_slots_gets_zeros():
    x, weights, ids, topk_weights = make_problem(20, SMALL)
    ids = ids.at[7].set(-1)
    y, _ = moe(x, weights, ids, topk_weights)
    assert not np.asarray(y[7], np.float32).any()


def test_no_tokens():
    x, weights, ids, topk_weights = make_problem(0, SMALL)
    y, load = moe(x, weights, ids, topk_weights)
    assert y.shape == (0, 512)
    assert not np.asarray(load).any()


@pytest.mark.parametrize("tokens", [6, 128, 500])
def test_repeated_launches_give_the_same_bits(tokens):
    x, weights, ids, topk_weights = make_problem(tokens, Sizes(1024, 512, 8, 4))
    first = np.asarray(moe(x, weights, ids, topk_weights)[0].view(jnp.uint16))
    for _ in range(20):
        # Other shapes in between leave other values in reused memory.
        moe(*make_problem(tokens + 1, SMALL, seed=1))
        np.testing.assert_array_equal(np.asarray(moe(x, weights, ids, topk_weights)[0].view(jnp.uint16)), first)


# swapAB (46 pairs per expert), the normal orientation, clusters of two CTAs (from 192) against single ones, images against rows.
@pytest.mark.parametrize(("tokens", "least", "experts"), [(92, 1, 8), (300, 93, 8), (900, 300, 8), (1300, 600, 40)])
def test_token_does_not_depend_on_its_batch(tokens, least, experts):
    x, weights, ids, topk_weights = make_problem(tokens, Sizes(1024, 512, experts, 4))
    together = np.asarray(moe(x, weights, ids, topk_weights)[0].view(jnp.uint16))
    for token in (0, 31, tokens - least):
        part = slice(token, token + least)
        alone = np.asarray(moe(x[part], weights, ids[part], topk_weights[part])[0].view(jnp.uint16))
        np.testing.assert_array_equal(alone, together[part])


def test_nan_stays_in_its_token():
    x, weights, ids, topk_weights = make_problem(16, SMALL)
    clean, _ = moe(x, weights, ids, topk_weights)
    y, _ = moe(x.at[3, 100].set(jnp.nan), weights, ids, topk_weights)
    assert np.isnan(np.asarray(y[3], np.float32)).all()
    others = [t for t in range(16) if t != 3]
    np.testing.assert_array_equal(np.asarray(y, np.float32)[others], np.asarray(clean, np.float32)[others])


@pytest.mark.parametrize("tokens", [16, 300])
def test_an_overflow_stays_visible_as_the_reference_has_it(tokens):
    """Activations that overflow to infinity: their token's result is no number, with no sign of its own; the others are right."""
    x, weights, ids, topk_weights = make_problem(tokens, Sizes(512, 384, 8, 4))
    topk_weights = topk_weights.at[3, 1].set(3e38)
    y, wanted = (np.asarray(f(x * 100, weights, ids, topk_weights)[0], np.float32) for f in (moe, reference))
    assert not np.isfinite(wanted[3]).any()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(wanted))
    rest = np.arange(tokens) != 3
    assert difference(y[rest], wanted[rest]) < 1e-4


@pytest.mark.parametrize("tokens", [8, 200])
def test_stacked_layers_in_a_scan(tokens):
    layers = [make_weights(SMALL, seed) for seed in range(3)]
    stacked = mm.stack_experts(layers)
    x, ids, topk_weights = make_inputs(tokens, SMALL)

    @jax.jit
    def run(x, stacked):
        step = lambda carry, i: (carry, mm.moe(x, stacked, ids, topk_weights, layer=i))  # noqa: E731
        return jax.lax.scan(step, 0, jnp.arange(3))[1]

    for y, weights in zip(run(x, stacked), layers, strict=True):
        np.testing.assert_array_equal(y.view(jnp.uint16), mm.moe(x, weights, ids, topk_weights).view(jnp.uint16))


def test_many_layers_in_one_program():
    core = importlib.import_module("jax_megamoe._core")
    layers = [make_weights(SMALL, seed) for seed in range(3)] * 4
    x, ids, topk_weights = make_inputs(16, SMALL)

    @jax.jit
    def run(x, layers):
        return [mm.moe(x, weights, ids, topk_weights) for weights in layers]

    for _ in range(3):
        run(x, layers)
    before = core.moe_execute_count()
    results = jax.block_until_ready(run(x, layers))
    assert core.moe_execute_count() == before, "the program was not replayed as a CUDA graph"
    for y, weights in zip(results, layers, strict=True):
        np.testing.assert_array_equal(y.view(jnp.uint16), mm.moe(x, weights, ids, topk_weights).view(jnp.uint16))


def test_captured_while_loop(monkeypatch):
    x, weights, ids, topk_weights = make_problem(16, SMALL)

    def run(x):
        return jax.lax.fori_loop(0, 5, lambda _, carry: x + 0.5 * mm.moe(carry, weights, ids, topk_weights), x)

    plain = jax.jit(run)(x)
    captured = jax.jit(run, compiler_options={"xla_gpu_graph_min_graph_size": 1})(x)
    np.testing.assert_array_equal(plain.view(jnp.uint16), captured.view(jnp.uint16))


def test_vmap_folds_into_tokens():
    x, weights, ids, topk_weights = make_problem(24, SMALL)
    fold = lambda value: value.reshape(3, 8, value.shape[-1])  # noqa: E731
    mapped = jax.vmap(lambda x, ids, topk_weights: mm.moe(x, weights, ids, topk_weights))(
        fold(x), fold(ids), fold(topk_weights)
    )
    flat = mm.moe(x, weights, ids, topk_weights)
    np.testing.assert_array_equal(mapped.reshape(24, 512).view(jnp.uint16), flat.view(jnp.uint16))


def test_next_call_works_after_an_error():
    problem = make_problem(8, SMALL)
    with pytest.raises(mm.errors.MegaMoEError):
        mm.moe(problem.x[:, :256], *problem[1:])
    assert_is_the_references(problem)
