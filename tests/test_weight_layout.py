"""The packed layout against its definition, element by element, and the way back."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_megamoe import weight_layout

FP8 = ml_dtypes.float8_e4m3fn
# Few enough sizes that most examples find their program compiled.
sizes = st.sampled_from([128, 256, 384])


def random_bytes(seed: int, *shape: int) -> np.ndarray:
    """All 256 byte values, NaNs among them: a layout moves bytes, whatever they mean."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def as_bytes(array: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


@settings(max_examples=10, deadline=None)
@given(hidden=sizes, intermediate=sizes, seed=st.integers(0, 99))
def test_gate_up_bytes_lie_where_the_definition_puts_them(hidden, intermediate, seed):
    natural = random_bytes(seed, 2 * intermediate, hidden)
    packed = as_bytes(jax.jit(weight_layout.pack_gate_up)(natural.view(FP8)))
    assert packed.shape == (intermediate // 64, hidden // 128, 16384)
    tile, block, plane, row, byte = np.indices((*packed.shape[:2], 2, 64, 128))
    g, q = row // 16, row % 16
    column = 64 * tile + 32 * plane + 8 * g + q % 8
    source = natural[column + np.where(q >= 8, intermediate, 0), 128 * block + byte]
    position = 8192 * plane + 128 * row + 16 * ((byte // 16) ^ (row % 8)) + byte % 16
    np.testing.assert_array_equal(packed[tile, block, position], source)


@settings(max_examples=10, deadline=None)
@given(hidden=sizes, intermediate=sizes, seed=st.integers(0, 99))
def test_down_bytes_lie_where_the_definition_puts_them(hidden, intermediate, seed):
    natural = random_bytes(seed, hidden, intermediate)
    packed = as_bytes(jax.jit(weight_layout.pack_down)(natural.view(FP8)))
    assert packed.shape == (hidden // 64, intermediate // 128, 8192)
    tile, block, row, byte = np.indices((*packed.shape[:2], 64, 128))
    g, q = row // 16, row % 16
    source = natural[64 * tile + 16 * g + np.where(q < 8, 2 * q, 2 * (q - 8) + 1), 128 * block + byte]
    np.testing.assert_array_equal(packed[tile, block, 128 * row + 16 * ((byte // 16) ^ (row % 8)) + byte % 16], source)


@pytest.mark.parametrize("intermediate", [128, 256, 384])
def test_scales_lie_where_the_definition_puts_them(intermediate):
    experts, hidden = 2, 384
    rng = np.random.default_rng(0)
    gate, up = rng.random((2, experts, intermediate // 128, hidden // 128), np.float32)
    packed = np.asarray(weight_layout.pack_gate_up_scale(jnp.concatenate([gate, up], axis=1)))
    wanted = np.zeros((experts, intermediate // 64, hidden // 128, 4), np.float32)
    for tile in range(intermediate // 64):
        wanted[:, tile, :, 0], wanted[:, tile, :, 1] = gate[:, tile // 2], up[:, tile // 2]
    np.testing.assert_array_equal(packed, wanted)

    down = rng.random((experts, hidden // 128, intermediate // 128), np.float32)
    packed = np.asarray(weight_layout.pack_down_scale(jnp.asarray(down)))
    wanted = np.zeros((experts, hidden // 64, -(-intermediate // 256), 4), np.float32)
    for tile, block in np.ndindex(hidden // 64, intermediate // 128):
        wanted[:, tile, block // 2, block % 2] = down[:, tile // 2, block]
    np.testing.assert_array_equal(packed, wanted)


def round_trip(gate_up, gate_up_scale, down, down_scale):
    return (
        weight_layout.unpack_gate_up(weight_layout.pack_gate_up(gate_up)),
        weight_layout.unpack_gate_up_scale(weight_layout.pack_gate_up_scale(gate_up_scale)),
        weight_layout.unpack_down(weight_layout.pack_down(down)),
        weight_layout.unpack_down_scale(weight_layout.pack_down_scale(down_scale), down.shape[-1]),
    )


@settings(max_examples=10, deadline=None)
@given(lead=st.sampled_from([(), (3,), (2, 1)]), hidden=sizes, intermediate=sizes, seed=st.integers(0, 99))
def test_unpacking_inverts_packing_under_any_leading_dimensions(lead, hidden, intermediate, seed):
    rng = np.random.default_rng(seed)
    natural = (
        random_bytes(seed, *lead, 2 * intermediate, hidden).view(FP8),
        rng.random((*lead, 2 * intermediate // 128, hidden // 128), np.float32),
        random_bytes(seed, *lead, hidden, intermediate).view(FP8),
        rng.random((*lead, hidden // 128, intermediate // 128), np.float32),
    )
    for restored, wanted in zip(jax.jit(round_trip)(*natural), natural, strict=True):
        np.testing.assert_array_equal(as_bytes(restored), as_bytes(wanted))


def test_leading_dimensions_equal_vmap():
    natural = random_bytes(0, 3, 256, 128).view(FP8)
    np.testing.assert_array_equal(
        as_bytes(weight_layout.pack_gate_up(natural)), as_bytes(jax.vmap(weight_layout.pack_gate_up)(natural))
    )
    np.testing.assert_array_equal(
        as_bytes(weight_layout.pack_down(natural)), as_bytes(jax.vmap(weight_layout.pack_down)(natural))
    )


def test_shapes_are_those_that_packing_makes():
    experts, hidden, intermediate = 3, 256, 384
    packed = (
        weight_layout.pack_gate_up(random_bytes(0, experts, 2 * intermediate, hidden).view(FP8)),
        weight_layout.pack_gate_up_scale(jnp.ones((experts, 2 * intermediate // 128, hidden // 128))),
        weight_layout.pack_down(random_bytes(0, experts, hidden, intermediate).view(FP8)),
        weight_layout.pack_down_scale(jnp.ones((experts, hidden // 128, intermediate // 128))),
    )
    assert tuple(leaf.shape for leaf in packed) == weight_layout.leaf_shapes("fp8_block", experts, hidden, intermediate)
