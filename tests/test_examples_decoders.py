"""The decoders of `examples` agree with `transformers` token by token; continuous batching and meshes change nothing."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import deepseek_v4
from examples.batching import Request
from examples.expectations import tiny
from examples.meshes import make_mesh
from jax_megamoe import checkpoints
from tests.support.decoders import FAMILIES, Array, Decoder, Expected, buffers

# With float experts both compute in FP32 and differ in the order of sums alone: 2e-5 of logits up to 15 were measured.
FLOAT_BOUND = 2e-4
# FP8 rounds the tokens on their way into both products of an expert, by up to 1/16 of each value. Logits, which deviate
# by 4, then differ by 0.07 (root of the mean square) and by up to 0.3; by 0.9 where another expert, group, or entry of attention
# wins so closely that what came before decides it. Two experts interchanged make it 0.18, DeepSeek's shared expert left
# out 1.1 (root of the mean square).
ROOT_MEAN_SQUARE_BOUND, LOGIT_BOUND, MARGIN = 0.1, 1.2, 0.5
# Sums in another order differ by 1e-6, by which a value next to a tie is rounded the other way, to BF16 and then to FP8.
# That moves all that comes after it: by up to 0.008 (root of the mean square) in batches of three instead of eight.
ORDER_BOUND = 0.02
NUM_SLOTS = 8
# For what all decoders have of the same functions: DeepSeek-V4's program takes long to compile.
OFTEN = pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.exhaustive] if name == "deepseek_v4" else []) for name in FAMILIES],
    indirect=True,
    scope="module",
)


def all_logits(requests: list[Request]) -> Array:
    return np.concatenate([request.logits for request in requests])


def root_mean_square(differences: Array) -> float:
    return float(np.sqrt(np.mean(differences**2)))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(family) -> Expected:
    return Expected.of(family)


@pytest.fixture(scope="module")
def folder(family, expected, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family) / "checkpoint"
    # If it differs, so does the checkpoint from that which the expectations are of: make them anew.
    assert tiny.write(family, folder) == expected.checkpoint_sha256
    return folder


@pytest.fixture(scope="module")
def quantized(family, folder) -> Decoder:
    return Decoder.load(family, folder)


# There are more requests than slots, so that some slots have two, one after the other, and in the end most are empty.
@pytest.fixture(scope="module")
def served(quantized, expected) -> list[Request]:
    return quantized.serve(expected.requests(), NUM_SLOTS)


@pytest.fixture(scope="module")
def served_in_float(quantized, expected) -> list[Request]:
    return quantized.in_float().serve(expected.requests(), NUM_SLOTS)


@pytest.fixture(scope="module")
def forced(quantized, expected) -> list[Array]:
    """The logits of `moe` after each token that `transformers` chose."""
    return quantized.forced_logits(expected, NUM_SLOTS)


def test_float_experts_give_the_tokens_of_transformers_and_their_logits(served_in_float, expected):
    """All but the expert layer's rounding: attention, norms, positions, router."""
    for request, case in zip(served_in_float, expected.cases, strict=True):
        assert request.generated == case["tokens"]
        for logits, name in ((request.logits[0], "first_logits"), (request.logits[-1], "last_logits")):
            if name in case:
                np.testing.assert_allclose(logits, case[name], rtol=0, atol=FLOAT_BOUND)
    assert sum("first_logits" in case for case in expected.cases) >= 5


@OFTEN
def test_moe_gives_the_tokens_of_transformers_but_where_two_are_close(forced, served_in_float, expected):
    """Its logits at all tokens are those of float experts, as the test before has shown."""
    logits = np.concatenate(forced)
    is_clear = expected.margins > MARGIN
    assert is_clear.mean() > 0.6
    np.testing.assert_array_equal(logits.argmax(axis=-1)[is_clear], expected.tokens[is_clear])
    differences = logits - all_logits(served_in_float)
    assert root_mean_square(differences) < ROOT_MEAN_SQUARE_BOUND
    assert np.abs(differences).max() < LOGIT_BOUND


@OFTEN
def test_sequences_do_not_see_what_else_is_in_the_batch(served, forced, expected):
    """Served with others that came and went, or begun together with others: the same, as long as the tokens are."""
    differences = []
    for request, logits, case in zip(served, forced, expected.cases, strict=True):
        is_same = np.cumprod(np.array([-1, *request.generated[:-1]]) == np.array([-1, *case["tokens"][:-1]]))
        count = int(is_same.sum())
        differences.append(np.array(request.logits[:count]) - logits[:count])
    assert sum(map(len, differences)) > 0.6 * len(expected.tokens)
    assert root_mean_square(np.concatenate(differences)) < ORDER_BOUND


@OFTEN
def test_a_mesh_of_eight_devices_gives_the_same_tokens(family, folder, expected, served, caplog):
    """Heads over four devices, sequences over two, experts over all eight: two on each."""
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh), caplog.at_level(logging.WARNING, "jax_megamoe"):
        sharded = Decoder.load(family, folder, mesh=mesh)
        gate_up = sharded.experts.leaves.gate_up
        assert gate_up.sharding.shard_shape(gate_up.shape)[1] == 2
        requests = sharded.serve(expected.requests(), NUM_SLOTS)
    assert not caplog.records  # `moe` would say what a placement costs without need
    assert [request.generated for request in requests] == [request.generated for request in served]
    assert root_mean_square(all_logits(requests) - all_logits(served)) < ORDER_BOUND


@pytest.mark.exhaustive
def test_unrolled_layers_give_the_same_tokens(quantized, expected, served):
    requests = quantized.unrolled().serve(expected.requests(), NUM_SLOTS)
    assert [request.generated for request in requests] == [request.generated for request in served]
    assert root_mean_square(all_logits(requests) - all_logits(served)) < ORDER_BOUND


def test_a_converted_checkpoint_gives_the_same_experts(family, folder, quantized, tmp_path):
    checkpoints.convert(folder, tmp_path / "packed")
    converted = Decoder.load(family, folder, experts_folder=tmp_path / "packed")
    for found, wanted in zip(buffers(converted.parameters), buffers(quantized.parameters), strict=True):
        np.testing.assert_array_equal(found, wanted)
    for found, wanted in zip(converted.experts.leaves, quantized.experts.leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), np.asarray(wanted).view(np.uint8))


@OFTEN
def test_a_step_takes_the_old_cache_and_leaves_empty_slots_alone(quantized):
    cache = jax.tree.map(lambda leaf: leaf + 1, quantized.empty_cache(NUM_SLOTS))
    tokens, positions = jnp.arange(8, dtype=jnp.int32), jnp.array([3, -1, 0, 39, -1, -1, 7, -1], jnp.int32)
    _, logits, after = quantized.step(cache, tokens, positions)
    assert all(leaf.is_deleted() for leaf in buffers(cache))
    assert np.isfinite(logits).all()
    for leaf in buffers(after):
        is_changed = np.asarray(leaf != 1)
        slots = is_changed.any(axis=(0, *range(2, leaf.ndim))).nonzero()[0]
        assert set(slots.tolist()) <= {0, 2, 3, 6}
    if quantized.module is deepseek_v4:  # Windows, in which there is a place for each used slot.
        for (layer,) in after:
            slots, places = np.asarray((layer.window[0] != 1).any(axis=-1)).nonzero()
            size = layer.window.shape[2]
            assert list(zip(slots.tolist(), places.tolist(), strict=True)) == [(0, 3), (2, 0), (3, 39 % size), (6, 7)]
        return
    for leaf in buffers(after):
        is_changed = np.asarray((leaf != 1).any(axis=(*range(2, leaf.ndim - 2), leaf.ndim - 1)))
        layers, slots, places = is_changed.nonzero()
        assert set(zip(slots.tolist(), places.tolist(), strict=True)) == {(0, 3), (2, 0), (3, 39), (6, 7)}
        assert set(layers.tolist()) == set(range(leaf.shape[0]))
