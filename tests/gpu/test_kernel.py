"""The fused kernel against the reference, on a Hopper GPU: `python -m pytest -m gpu tests/gpu`."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_megamoe as mm
from gpu.inputs import difference, make_inputs, make_weights
from gpu.needs import needs_hopper

pytestmark = needs_hopper

moe: Any = jax.jit(functools.partial(mm.moe, activation_clamp=6.0, routed_scaling_factor=1.5, return_expert_load=True))
reference: Any = jax.jit(
    functools.partial(mm.reference.moe, activation_clamp=6.0, routed_scaling_factor=1.5, return_expert_load=True)
)


def check(x, weights, ids, routing) -> None:
    y, load = moe(x, weights, ids, routing)
    wanted, wanted_load = reference(x, weights, ids, routing)
    assert y.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(y, np.float32)).all()
    np.testing.assert_array_equal(load, wanted_load)
    assert difference(y, wanted) < 1e-4


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 16, 33, 64, 127, 128, 129, 200, 256, 1000, 8192])
def test_token_counts(tokens):
    check(*_call(tokens, 512, 384, 8, 4))


def _call(tokens, hidden, inter, num_experts, top_k, routing="uniform", seed=0):
    x, ids, weights = make_inputs(tokens, hidden, num_experts, top_k, routing, seed)
    return x, make_weights(num_experts, hidden, inter), ids, weights


@pytest.mark.parametrize("tokens", [1, 24, 128, 300])
@pytest.mark.parametrize(
    ("hidden", "inter"),
    [(4096, 2048), (7168, 3072), (7168, 2048), (2048, 768), (6144, 2048), (4096, 1408), (128, 128), (256, 384)],
)
def test_shapes(hidden, inter, tokens):
    check(*_call(tokens, hidden, inter, 8, 6))


@pytest.mark.parametrize("top_k", [1, 2, 6, 8, 32])
@pytest.mark.parametrize("tokens", [5, 128, 700])
def test_top_k(top_k, tokens):
    check(*_call(tokens, 256, 256, 16, top_k))


@pytest.mark.parametrize("routing", ["one", "masked", "none"])
@pytest.mark.parametrize("tokens", [1, 40, 128, 300])
def test_routings(routing, tokens):
    check(*_call(tokens, 512, 256, 8, 4, routing))


@pytest.mark.parametrize("routing", ["uniform", "one", "masked"])
@pytest.mark.parametrize(("hidden", "inter"), [(640, 384), (512, 256)])
@pytest.mark.parametrize("tokens", [192, 260, 390, 700])
def test_experts_of_several_chunks(tokens, hidden, inter, routing):
    """From 192 pairs per expert on, clusters of two thread blocks share weights; an odd number of tiles leaves one without work."""
    check(*_call(tokens, hidden, inter, 4, 4, routing))


@pytest.mark.parametrize("routing", ["uniform", "one", "masked", "none"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inter", "experts", "top_k"), [(640, 512, 384, 48, 4), (300, 384, 128, 133, 32)]
)
def test_tokens_that_are_gathered_by_row(tokens, hidden, inter, experts, top_k, routing):
    """The normal orientation with up to 112 pairs per expert (76 on an H200) and a gate/up unit for each SM."""
    check(*_call(tokens, hidden, inter, experts, top_k, routing))


@pytest.mark.parametrize("num_experts", [1, 3, 256, 1024])
def test_numbers_of_experts(num_experts):
    check(*_call(100, 128, 128, num_experts, 4))


def test_a_call_whose_scratch_would_exceed_4_gb():
    """It becomes two launches; each token gets what it gets in a batch of its own."""
    weights = make_weights(8, 1024, 128)
    x, ids, probs = make_inputs(65536, 1024, 8, 32)
    y, load = moe(x, weights, ids, probs)
    np.testing.assert_array_equal(load, np.bincount(np.ravel(ids), minlength=8))
    for first in (0, 40000):
        part = slice(first, first + 1000)
        wanted, _ = moe(x[part], weights, ids[part], probs[part])
        np.testing.assert_array_equal(np.asarray(y[part]).view(np.uint16), np.asarray(wanted).view(np.uint16))


def test_token_without_slots_gets_zeros():
    x, weights, ids, routing = _call(20, 512, 256, 8, 4)
    ids = ids.at[7].set(-1)
    y, _ = moe(x, weights, ids, routing)
    assert not np.asarray(y[7], np.float32).any()


def test_no_tokens():
    x, weights, ids, routing = _call(0, 512, 256, 8, 4)
    y, load = moe(x, weights, ids, routing)
    assert y.shape == (0, 512)
    assert not np.asarray(load).any()


@pytest.mark.parametrize("tokens", [6, 128, 500])
def test_repeated_launches_give_the_same_bits(tokens):
    x, weights, ids, routing = _call(tokens, 1024, 512, 8, 4)
    first = np.asarray(moe(x, weights, ids, routing)[0].view(jnp.uint16))
    for _ in range(20):
        # Other shapes in between leave other values in reused memory.
        moe(*_call(tokens + 1, 512, 256, 8, 4, seed=1))
        np.testing.assert_array_equal(np.asarray(moe(x, weights, ids, routing)[0].view(jnp.uint16)), first)


# swapAB (46 pairs per expert), the normal orientation, clusters of two CTAs (from 192) against single ones, images against rows.
@pytest.mark.parametrize(("tokens", "least", "experts"), [(92, 1, 8), (300, 93, 8), (900, 300, 8), (1300, 600, 40)])
def test_token_does_not_depend_on_its_batch(tokens, least, experts):
    x, weights, ids, routing = _call(tokens, 1024, 512, experts, 4)
    together = np.asarray(moe(x, weights, ids, routing)[0].view(jnp.uint16))
    for token in (0, 31, tokens - least):
        part = slice(token, token + least)
        alone = np.asarray(moe(x[part], weights, ids[part], routing[part])[0].view(jnp.uint16))
        np.testing.assert_array_equal(alone, together[part])


def test_nan_stays_in_its_token():
    x, weights, ids, routing = _call(16, 512, 256, 8, 4)
    clean, _ = moe(x, weights, ids, routing)
    y, _ = moe(x.at[3, 100].set(jnp.nan), weights, ids, routing)
    assert np.isnan(np.asarray(y[3], np.float32)).all()
    others = [t for t in range(16) if t != 3]
    np.testing.assert_array_equal(np.asarray(y, np.float32)[others], np.asarray(clean, np.float32)[others])


@pytest.mark.parametrize("tokens", [16, 300])
def test_an_overflow_stays_visible_as_the_reference_has_it(tokens):
    """Activations that overflow to infinity: their token's result is no number, with no sign of its own; the others are right."""
    x, weights, ids, routing = _call(tokens, 512, 384, 8, 4)
    routing = routing.at[3, 1].set(3e38)
    y, wanted = (np.asarray(f(x * 100, weights, ids, routing)[0], np.float32) for f in (moe, reference))
    assert not np.isfinite(wanted[3]).any()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(wanted))
    rest = np.arange(tokens) != 3
    assert difference(y[rest], wanted[rest]) < 1e-4


@pytest.mark.parametrize("tokens", [8, 200])
def test_stacked_layers_in_a_scan(tokens):
    layers = [make_weights(8, 512, 256, seed) for seed in range(3)]
    stacked = mm.stack_experts(layers)
    x, ids, routing = make_inputs(tokens, 512, 8, 4)

    @jax.jit
    def run(x, stacked):
        return jax.lax.scan(lambda carry, i: (carry, mm.moe(x, stacked, ids, routing, layer=i)), 0, jnp.arange(3))[1]

    for y, weights in zip(run(x, stacked), layers, strict=True):
        np.testing.assert_array_equal(y.view(jnp.uint16), mm.moe(x, weights, ids, routing).view(jnp.uint16))


def test_many_layers_in_one_program():
    core = importlib.import_module("jax_megamoe._core")
    layers = [make_weights(8, 512, 256, seed) for seed in range(3)] * 4
    x, ids, routing = make_inputs(16, 512, 8, 4)

    @jax.jit
    def run(x, layers):
        return [mm.moe(x, weights, ids, routing) for weights in layers]

    for _ in range(3):
        run(x, layers)
    before = core.moe_execute_count()
    results = jax.block_until_ready(run(x, layers))
    assert core.moe_execute_count() == before, "the program was not replayed as a CUDA graph"
    for y, weights in zip(results, layers, strict=True):
        np.testing.assert_array_equal(y.view(jnp.uint16), mm.moe(x, weights, ids, routing).view(jnp.uint16))


def test_captured_while_loop(monkeypatch):
    weights = make_weights(8, 512, 256)
    x, ids, routing = make_inputs(16, 512, 8, 4)

    def run(x):
        return jax.lax.fori_loop(0, 5, lambda _, carry: x + 0.5 * mm.moe(carry, weights, ids, routing), x)

    plain = jax.jit(run)(x)
    captured = jax.jit(run, compiler_options={"xla_gpu_graph_min_graph_size": 1})(x)
    np.testing.assert_array_equal(plain.view(jnp.uint16), captured.view(jnp.uint16))


def test_vmap_folds_into_tokens():
    x, weights, ids, routing = _call(24, 512, 256, 8, 4)
    fold = lambda value: value.reshape(3, 8, value.shape[-1])  # noqa: E731
    mapped = jax.vmap(lambda x, ids, routing: mm.moe(x, weights, ids, routing))(fold(x), fold(ids), fold(routing))
    flat = mm.moe(x, weights, ids, routing)
    np.testing.assert_array_equal(mapped.reshape(24, 512).view(jnp.uint16), flat.view(jnp.uint16))


def test_next_call_works_after_an_error():
    x, weights, ids, routing = _call(8, 512, 256, 8, 4)
    with pytest.raises(mm.errors.MegaMoEError):
        mm.moe(x[:, :256], weights, ids, routing)
    check(x, weights, ids, routing)
