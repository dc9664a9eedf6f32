"""MXFP4: E2M1 values in groups of 32 along K with an E8M0 exponent each; its arithmetic, and its planes.

A weight is E2M1 * 2^(e - 127), e the byte of its group. *Codes* are two E2M1 values a byte, the lower column in the low
nibble: bit 3 the sign, bits 0 to 2 the magnitude of 0, 0.5, 1, 1.5, 2, 3, 4, 6.

The kernel decodes a weight as the E5M2 number E2M1 * 2^(d - 13), which is exact for d of 0 to 26, and multiplies the
sum over K by the row's power of two. So e is stored as d = e - base, with one base for a row: base = max(e_max - 26, 0)
for the largest exponent e_max of its groups that are not all zeros (127 where all are), and the row's scale is
2^(base - 114). A row whose groups spread over more than 26 binades, or with an exponent of 255 (NaN), cannot be served:
its scale is NaN, its base 0, so that its results are NaN and its bytes still come back.

A plane is 64 rows of 128 columns in 4352 bytes; `weight_layout` says which weight row is row r of a plane. With row
r = 16w + 8 rh + r', h, s and g of 0 and 1, and c = 0 to 3:

- Bytes 0 to 4095 are 32-bit little-endian words, word h*512 + w*128 + (4r' + c)*4 + 2s + rh, so that a thread of WGMMA
  loads two of its steps at once. A word holds columns 64h + 16c + 8s + i, the low half, and 4 more, the high half,
  i = 0 to 3: magnitudes at bits 4i and 16 + 4i, signs at bits 8i + 7 (low half) and 8i + 3 (high half), where the
  bytes of E5M2 want them. So a thread's two words of a row and h are of one group. That is not the order of columns in
  which WGMMA would take them from memory: the kernel stores tokens and activations in the same one.
- Byte 4096 + 64w + 8r' + 4g + 2h + rh is d, modulo 256, of columns 64h + 32g to 64h + 32g + 31: groups of zeros may
  have any exponent.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_megamoe.weight_layout import BLOCK, MXFP4_PLANE_BYTES, PLANE_ROWS, permute_trailing, reshape_trailing

GROUP = 32  # columns that share an exponent
SPREAD = 26  # binades over which the exponents of a row may spread
NAN_EXPONENT = 255
ONE_EXPONENT = 127  # stands for 2^0; that of a group of zeros

_CODE_BYTES = PLANE_ROWS * BLOCK // 2
_GROUPS = BLOCK // GROUP
DECODE_BIAS = 13  # a group with d = 13 is decoded as it is
_F32_BIAS = 127
_F32_MANTISSA = 23


def codes_of_float4(values: jax.Array) -> jax.Array:
    """float4_e2m1fn[..., K] -> codes uint8[..., K/2]."""
    return _join_nibbles(jax.lax.bitcast_convert_type(values, jnp.uint4).astype(jnp.uint8))


def are_zero_groups(codes: jax.Array) -> jax.Array:
    """Codes [..., K/2] -> bool[..., K/32], whether all values of a group are zeros of either sign."""
    lead = codes.ndim - 1
    return jnp.all(reshape_trailing(codes & 0x77, lead, codes.shape[-1] * 2 // GROUP, GROUP // 2) == 0, axis=-1)


def row_scales(exponents: jax.Array, is_zero: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exponents uint8[..., K/32], and which groups are zeros -> the base uint8[...] and scale f32[...] of each row.

    Rows that cannot be served have base 0 and scale NaN.
    """
    e = exponents.astype(jnp.int32)
    largest = jnp.max(jnp.where(is_zero, -1, e), axis=-1)
    largest = jnp.where(largest < 0, ONE_EXPONENT, largest)
    base = jnp.maximum(largest - SPREAD, 0)
    is_served = jnp.all((is_zero | (e >= base[..., None])) & (e != NAN_EXPONENT), axis=-1)
    base = jnp.where(is_served, base, 0)
    # 2^(base - 114), by its bits.
    bits = (base + (_F32_BIAS - ONE_EXPONENT + DECODE_BIAS)) << _F32_MANTISSA
    scale = jax.lax.bitcast_convert_type(jnp.where(is_served, bits, 0x7FC00000), jnp.float32)
    return base.astype(jnp.uint8), scale


def e8m0(d: jax.Array, scale: jax.Array) -> jax.Array:
    """Stored exponents uint8[..., K/32] and the scales f32[...] of their rows -> float8_e8m0fnu[..., K/32]."""
    field = (jax.lax.bitcast_convert_type(scale, jnp.int32) >> _F32_MANTISSA) & 0xFF
    base = jnp.where(field == 0xFF, 0, field - DECODE_BIAS).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(d + base[..., None], jnp.float8_e8m0fnu)


def decode(codes: jax.Array, d: jax.Array) -> jax.Array:
    """Codes [..., K/2] and stored exponents uint8[..., K/32] -> bf16[..., K], E2M1 * 2^(d - 13), exactly."""
    lead = codes.ndim - 1
    groups = d.shape[-1]
    nibbles = reshape_trailing(jnp.stack([codes & 0xF, codes >> 4], axis=-1), lead, groups, GROUP).astype(jnp.uint16)
    magnitude = nibbles & 7
    # That of a group of zeros may be any.
    exponent = jnp.minimum(d, SPREAD).astype(jnp.uint16)[..., None] + jnp.uint16(_F32_BIAS - DECODE_BIAS - 1)
    # Codes of 2 and more are an exponent and one bit of mantissa; code 1, 0.5, is subnormal in E2M1, but not in BF16.
    exponent += magnitude >> 1
    bits = (exponent << 7) | jnp.where(magnitude > 1, (magnitude & 1) << 6, 0).astype(jnp.uint16)
    bits = jnp.where(magnitude == 0, jnp.uint16(0), bits) | (nibbles >> 3) << 15
    return reshape_trailing(jax.lax.bitcast_convert_type(bits, jnp.bfloat16), lead, groups * GROUP)


def pack_gate_up(codes: jax.Array, d: jax.Array) -> jax.Array:
    """Codes [..., 2I, H/2], gate rows first, and stored exponents [..., 2I, H/32] -> uint8[..., I/64, H/128, 8704]."""
    return _pack_planes(_gate_up_planes(codes), _gate_up_planes(d))


def unpack_gate_up(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `pack_gate_up`."""
    codes, d = (_gate_up_rows(planes) for planes in _unpack_planes(packed, 2))
    return codes, d


def pack_down(codes: jax.Array, d: jax.Array) -> jax.Array:
    """Codes [..., H, I/2] and stored exponents [..., H, I/32] -> uint8[..., H/64, I/128, 4352]."""
    return _pack_planes(_down_planes(codes), _down_planes(d))


def unpack_down(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `pack_down`."""
    codes, d = (_down_rows(planes) for planes in _unpack_planes(packed, 1))
    return codes, d


def group_magnitudes(weight: jax.Array, axis: int) -> jax.Array:
    """The largest magnitude of each 32 values along an axis, float[..., K, ...] -> int32[..., K/32, ...].

    Magnitudes as FP32 bits, of which 2^23 is a binade; those of subnormals go on below zero, that of 0 is far below.
    All that is done with them is done with integers: arithmetic may take subnormal FP32 numbers for zero.
    """
    axis %= weight.ndim
    sizes = (weight.shape[axis] // GROUP, GROUP, *weight.shape[axis + 1 :])
    return jnp.max(_magnitudes(reshape_trailing(weight, axis, *sizes)), axis=axis + 1)


def exponents_of(magnitudes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `group_magnitudes` gives -> exponents uint8 of the same shape, and which groups are quantised to zeros.

    The exponent of OCP MX, floor(log2(amax)) - 2, which makes amax one of 4 to 8; 127 for zeros, 255 where a value is
    NaN or infinite.
    """
    binade = magnitudes >> _F32_MANTISSA
    # Up to a quarter of 2^-127, the smallest power of two that an exponent can be.
    is_zero = magnitudes <= (-2 << _F32_MANTISSA)
    exponents = jnp.where(is_zero, ONE_EXPONENT, jnp.maximum(binade - 2, 0))
    return jnp.where(binade == 0xFF, NAN_EXPONENT, exponents).astype(jnp.uint8), is_zero


# Magnitudes from which the next code is meant. Ties go to even codes: every second one is a tie that stays below.
_THRESHOLDS = [(0.25, 1), (0.75, 0), (1.25, 1), (1.75, 0), (2.5, 1), (3.5, 0), (5.0, 1)]


def quantize(weight: jax.Array, exponents: jax.Array) -> jax.Array:
    """Float [..., K] and exponents uint8[..., K/32] -> codes [..., K/2]: to nearest even, saturating at 6."""
    lead = weight.ndim - 1
    values = reshape_trailing(weight, lead, exponents.shape[-1], GROUP)
    shift = exponents.astype(jnp.int32)[..., None] - ONE_EXPONENT
    scaled = _magnitudes(values) - (shift << _F32_MANTISSA)
    nibbles = jnp.where(_f32_bits(values) < 0, 8, 0).astype(jnp.uint8)
    for threshold, is_tie_below in _THRESHOLDS:
        bits = int(np.float32(threshold).view(np.int32)) + is_tie_below
        nibbles += (scaled >= bits).astype(jnp.uint8)
    return _join_nibbles(reshape_trailing(nibbles, lead, weight.shape[-1]))


def _f32_bits(values: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)


def _magnitudes(values: jax.Array) -> jax.Array:
    bits = _f32_bits(values) & 0x7FFFFFFF
    shift = jax.lax.clz(bits) - (31 - _F32_MANTISSA)
    subnormal = ((1 - shift) << _F32_MANTISSA) + ((bits << shift) & ((1 << _F32_MANTISSA) - 1))
    subnormal = jnp.where(bits == 0, -(1 << 30), subnormal)
    return jnp.where(bits < 1 << _F32_MANTISSA, subnormal, bits)


def _join_nibbles(nibbles: jax.Array) -> jax.Array:
    pairs = reshape_trailing(nibbles, nibbles.ndim - 1, nibbles.shape[-1] // 2, 2)
    return _at(pairs, -1, 0) | _at(pairs, -1, 1) << 4


def _at(x: jax.Array, axis: int, index: int) -> jax.Array:
    return jax.lax.index_in_dim(x, index, axis, keepdims=False)


def _exchange_signs(x: jax.Array) -> jax.Array:
    """Codes [..., half, pair] -> the bytes of their words, of the same shape."""
    low = [_at(_at(x, -2, 0), -1, pair) for pair in range(2)]
    high = [_at(_at(x, -2, 1), -1, pair) for pair in range(2)]
    halves = [
        jnp.stack(
            [
                magnitudes[0] & 0x77 | (low[half] & 0x08) << 4 | (high[half] & 0x08),
                magnitudes[1] & 0x77 | (low[half] & 0x80) | (high[half] & 0x80) >> 4,
            ],
            axis=-1,
        )
        for half, magnitudes in enumerate((low, high))
    ]
    return jnp.stack(halves, axis=-2)


def _restore_signs(x: jax.Array) -> jax.Array:
    """The inverse of `_exchange_signs`."""
    of_half = [[_at(_at(x, -2, half), -1, pair) for pair in range(2)] for half in range(2)]
    low, high = of_half
    halves = [
        jnp.stack([low[n] & 0x77 | (of_half[n][0] & 0x80) >> 4 | (of_half[n][1] & 0x80) for n in range(2)], axis=-1),
        jnp.stack([high[n] & 0x77 | (of_half[n][0] & 0x08) | (of_half[n][1] & 0x08) << 4 for n in range(2)], axis=-1),
    ]
    return jnp.stack(halves, axis=-2)


def _gate_up_planes(x: jax.Array) -> jax.Array:
    """[..., 2I, C] -> [..., tile, plane, w, rh, r', C]."""
    tiles = x.shape[-2] // (2 * PLANE_ROWS)
    return permute_trailing(reshape_trailing(x, x.ndim - 2, 2, tiles, 2, 4, 8, x.shape[-1]), (1, 2, 3, 0, 4, 5))


def _gate_up_rows(planes: jax.Array) -> jax.Array:
    """The inverse of `_gate_up_planes`."""
    lead, tiles, columns = planes.ndim - 6, planes.shape[-6], planes.shape[-1]
    return reshape_trailing(permute_trailing(planes, (3, 0, 1, 2, 4, 5)), lead, 2 * tiles * PLANE_ROWS, columns)


def _down_planes(x: jax.Array) -> jax.Array:
    """[..., H, C] -> [..., tile, 1, w, rh, r', C]."""
    tiles = x.shape[-2] // PLANE_ROWS
    return permute_trailing(reshape_trailing(x, x.ndim - 2, tiles, 1, 4, 8, 2, x.shape[-1]), (0, 1, 2, 4, 3, 5))


def _down_rows(planes: jax.Array) -> jax.Array:
    """The inverse of `_down_planes`."""
    lead, tiles, columns = planes.ndim - 6, planes.shape[-6], planes.shape[-1]
    return reshape_trailing(permute_trailing(planes, (0, 1, 2, 4, 3, 5)), lead, tiles * PLANE_ROWS, columns)


# Of tile, plane, w, rh, r', K block, and then h, c, s, half, pair of the codes, or h, g of the exponents.
_CODES_ORDER = (0, 5, 1, 6, 2, 4, 7, 8, 3, 9, 10)
_EXPONENTS_ORDER = (0, 5, 1, 2, 4, 7, 6, 3)


def _pack_planes(codes: jax.Array, d: jax.Array) -> jax.Array:
    """Codes and stored exponents [..., tile, plane, w, rh, r', C] -> uint8[..., tile, K block, bytes of the planes]."""
    lead = codes.ndim - 6
    tiles, planes = codes.shape[lead : lead + 2]
    blocks = d.shape[-1] // _GROUPS
    rows = (tiles, planes, 4, 2, 8)
    words = _exchange_signs(reshape_trailing(codes, lead, *rows, blocks, 2, 4, 2, 2, 2))
    words = reshape_trailing(permute_trailing(words, _CODES_ORDER), lead, tiles, blocks, planes, _CODE_BYTES)
    d = permute_trailing(reshape_trailing(d, lead, *rows, blocks, 2, 2), _EXPONENTS_ORDER)
    d = reshape_trailing(d, lead, tiles, blocks, planes, MXFP4_PLANE_BYTES - _CODE_BYTES)
    return reshape_trailing(jnp.concatenate([words, d], axis=-1), lead, tiles, blocks, planes * MXFP4_PLANE_BYTES)


def _unpack_planes(packed: jax.Array, planes: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_pack_planes`, of so many planes in a tile."""
    lead = packed.ndim - 3
    tiles, blocks = packed.shape[lead : lead + 2]
    x = reshape_trailing(packed, lead, tiles, blocks, planes, MXFP4_PLANE_BYTES)
    words = reshape_trailing(x[..., :_CODE_BYTES], lead, tiles, blocks, planes, 2, 4, 8, 4, 2, 2, 2, 2)
    codes = _restore_signs(permute_trailing(words, _inverse(_CODES_ORDER)))
    d = reshape_trailing(x[..., _CODE_BYTES:], lead, tiles, blocks, planes, 4, 8, 2, 2, 2)
    d = permute_trailing(d, _inverse(_EXPONENTS_ORDER))
    rows = (tiles, planes, 4, 2, 8)
    return (
        reshape_trailing(codes, lead, *rows, blocks * BLOCK // 2),
        reshape_trailing(d, lead, *rows, blocks * _GROUPS),
    )


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(axis) for axis in range(len(order)))
