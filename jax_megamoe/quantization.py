"""FP8 (E4M3) quantisation: the rounding and the kinds of scales of docs/numerics.md, and dequantisation."""

import jax
import jax.numpy as jnp

from jax_megamoe.weight_layout import reshape_trailing

E4M3_MAX = 448.0
TOKEN_BLOCK = 128  # hidden columns that share one scale of a token
ACTIVATION_BLOCK = 64  # intermediate columns that share one scale between the two GEMMs
BATCH_INVARIANT_ACTIVATION_BLOCK = 128  # ... where a call is batch-invariant
WEIGHT_BLOCK = 128  # rows, and columns, that share one weight scale
# Floors of the largest magnitude, which keep the scale of a row of zeros away from zero.
TOKEN_AMAX_FLOOR = 1e-4
ACTIVATION_AMAX_FLOOR = 1e-30

_MIN_NORMAL_E4M3 = 2.0**-6
_SUBNORMAL_STEPS = 2.0**9  # E4M3 values per unit below 2^-6
_MIN_BLOCK_AMAX = 512 * float(jnp.finfo(jnp.float32).tiny)


def to_e4m3(values: jax.Array) -> jax.Array:
    """f32[...] -> f8e4m3fn[...]: round to nearest even, saturate at +-448; NaN stays NaN.

    The rounding is done here, in FP32, so that the cast is exact: how a cast rounds is the backend's choice, and one
    that goes through half precision rounds twice.
    """
    values = jnp.asarray(values, jnp.float32)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    # Just under half a unit of what is kept, or exactly half where that is odd, carries as ties to even want it.
    rounded_bits = (bits + jnp.uint32(0x7FFFF) + ((bits >> 20) & 1)) & jnp.uint32(0xFFF00000)
    normal = jax.lax.bitcast_convert_type(rounded_bits, jnp.float32)
    # Below 2^-6 the values are equidistant; `round` is to nearest even.
    subnormal = jnp.round(values * _SUBNORMAL_STEPS) / _SUBNORMAL_STEPS
    rounded = jnp.where(jnp.abs(values) < _MIN_NORMAL_E4M3, subnormal, normal)
    saturated = jnp.clip(jnp.where(jnp.isnan(values), jnp.nan, rounded), -E4M3_MAX, E4M3_MAX)
    return saturated.astype(jnp.float8_e4m3fn)


def divide(a: jax.Array, b: jax.Array | float) -> jax.Array:
    """The FP32 quotient a / b, correctly rounded on every backend.

    Compilers turn divisions by a shared divisor into multiplications by its reciprocal, and GPUs divide approximately
    by default; the result, and with it an FP8 value next to a tie, would depend on the backend. One step with the exact
    remainder repairs it.
    """
    b = jnp.asarray(b, jnp.float32)
    quotient = a / b
    q_high, q_low = _split(quotient)
    b_high, b_low = _split(b)
    # Every product and difference is exact, fused or not: the halves have twelve bits.
    remainder = ((a - q_high * b_high) - q_high * b_low - q_low * b_high) - q_low * b_low
    correction = remainder / b
    # Adding zero would lose the sign of -0.
    return jnp.where(jnp.isfinite(correction) & (correction != 0), quotient + correction, quotient)


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high


def power_of_two_scale(amax: jax.Array) -> jax.Array:
    """2^ceil(log2(amax / 448)) for f32[...] of at least 1e-30, exactly; not finite where `amax` is not."""
    # 448 = 1.75 * 2^8. Adding all of the mantissa beyond that of 1.75 carries into the exponent where amax's is larger.
    bits = jax.lax.bitcast_convert_type(amax, jnp.uint32)
    bits = ((bits + jnp.uint32(0x1FFFFF)) & jnp.uint32(0x7F800000)) - jnp.uint32(8 << 23)
    return jnp.where(jnp.isfinite(amax), jax.lax.bitcast_convert_type(bits, jnp.float32), amax)


def quantize_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states, float [..., H] -> f8e4m3fn[..., H], f32[..., H/128] scales: one per token and 128 columns."""
    blocks = _blocked(x, TOKEN_BLOCK)
    scale = _token_scale(_amax(blocks))
    return to_e4m3(divide(blocks, scale[..., None])).reshape(x.shape), scale


def round_to_bf16(values: jax.Array) -> jax.Array:
    """f32[...] or bf16[...] -> f32[...], rounded to BF16, which numbers that are said to be BF16 may not be yet.

    Where a program makes BF16 numbers of FP32 ones, XLA on GPUs hands the latter to whatever widens the former again.
    """
    return jax.lax.reduce_precision(jnp.asarray(values, jnp.float32), exponent_bits=8, mantissa_bits=7)


def quantize_tokens_to_send(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states bf16[..., H] -> f8e4m3fn[..., H] of `quantize_tokens`, bf16[..., H/128] largest magnitudes.

    A largest magnitude is one of the BF16 numbers of x: two bytes from which the FP32 scale follows, bit by bit.
    """
    x = round_to_bf16(x)
    values, _ = quantize_tokens(x)
    return values, _amax(_blocked(x, TOKEN_BLOCK)).astype(jnp.bfloat16)


def restore_tokens(values: jax.Array, amax: jax.Array) -> jax.Array:
    """What `quantize_tokens_to_send` returns -> bf16[..., H], of which the same FP8 values and scales are made again.

    The same values: BF16 moves value * scale by at most 2^-8 of itself, and E4M3 rounds back what has moved less than
    2^-5. The same scales: the largest magnitude is 448 as FP8, and 448 * scale rounds to it in BF16. Only where the
    floor of 1e-4 is in force may a product be larger. It is cut to the largest magnitude, whose own FP8 value is the
    same: it lies between that value's number in x and the product. NaN is not cut: largest magnitudes may lack it. A
    block with an infinity is restored as nothing but NaN.
    """
    products = _blocked(values.astype(jnp.float32), TOKEN_BLOCK) * _token_scale(amax.astype(jnp.float32))[..., None]
    # By bits, so that a compiler that is free to keep more precision than asked for rounds to BF16 here.
    bits = jax.lax.bitcast_convert_type(products.astype(jnp.bfloat16), jnp.uint16)
    largest = jax.lax.bitcast_convert_type(amax, jnp.uint16)[..., None]
    sign, magnitude = bits & jnp.uint16(0x8000), bits & jnp.uint16(0x7FFF)
    is_nan = magnitude > jnp.uint16(0x7F80)
    bits = sign | jnp.where(is_nan, magnitude, jnp.minimum(magnitude, largest))
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).reshape(values.shape)


def quantize_activations(a: jax.Array, block: int = ACTIVATION_BLOCK) -> tuple[jax.Array, jax.Array]:
    """Input of the down projection, float [..., I] -> f8e4m3fn[..., I], f32[..., I/block] scales, powers of two."""
    blocks = _blocked(a, block)
    scale = power_of_two_scale(jnp.maximum(_amax(blocks), ACTIVATION_AMAX_FLOOR))
    return to_e4m3(divide(blocks, scale[..., None])).reshape(a.shape), scale


def quantize_blocks(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A weight, float [..., N, K] -> f8e4m3fn[..., N, K], f32[..., N/128, K/128] scales: one per 128x128 block.

    If the smallest power of two at least amax / 448 scales a block to FP8 values exactly, it is the scale, and nothing
    is lost; no larger power of two holds more. Else the scale is amax / 448. A block of zeros, or of numbers so small
    that their scale would be subnormal, has scale 1.
    """
    blocks = _weight_blocks(weight)
    scale = _weight_scale(blocks, (-3, -1))
    values = to_e4m3(divide(blocks, jnp.expand_dims(scale, (-3, -1))))
    return reshape_trailing(values, weight.ndim - 2, *weight.shape[-2:]), scale


def row_scales(weight: jax.Array, axis: int) -> jax.Array:
    """The scale of each row of a weight, whose columns lie along the axis, as `quantize_blocks` chooses it."""
    return _weight_scale(jnp.asarray(weight, jnp.float32), axis)


def quantize_rows(weight: jax.Array, scale: jax.Array) -> jax.Array:
    """A weight, or columns of it, float [..., N, K], and scales f32[..., N] of its rows -> f8e4m3fn[..., N, K]."""
    return to_e4m3(divide(jnp.asarray(weight, jnp.float32), scale[..., None]))


def _weight_scale(weight: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """The scale of all that lies along the axes."""
    amax = jnp.max(jnp.abs(weight), axis=axes)
    power = power_of_two_scale(jnp.maximum(amax, _MIN_BLOCK_AMAX))
    is_exact = jnp.all(_are_e4m3_values(weight, jnp.expand_dims(power, axes)), axis=axes)
    return jnp.where(amax < _MIN_BLOCK_AMAX, 1.0, jnp.where(is_exact, power, divide(amax, E4M3_MAX)))


def _are_e4m3_values(values: jax.Array, scale: jax.Array) -> jax.Array:
    """Whether values / scale, of at most 448, are E4M3 values; the scale is a power of two."""
    # They have four significant bits, the last of them worth at least one step of the subnormals.
    steps = divide(values, scale) * _SUBNORMAL_STEPS
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    # Arithmetic may take subnormal FP32 numbers for zero; their bits tell.
    exponent_bits, mantissa_bits = bits & 0x7F800000, bits & 0x7FFFFF
    return ((bits & 0xFFFFF) == 0) & (steps == jnp.round(steps)) & ((exponent_bits != 0) | (mantissa_bits == 0))


def widen_scale(scale: jax.Array) -> jax.Array:
    """Scales f32, bf16, f8e8m0fnu, or uint8, the bytes of the last -> f32, exactly; byte b is 2^(b - 127), 255 NaN."""
    if scale.dtype == jnp.float8_e8m0fnu:
        scale = jax.lax.bitcast_convert_type(scale, jnp.uint8)
    if scale.dtype != jnp.uint8:
        return scale.astype(jnp.float32)
    # By bits, since 2^-127 is subnormal in FP32, and arithmetic may take it for zero.
    exponents = scale.astype(jnp.uint32)
    bits = jnp.where(exponents == 0, jnp.uint32(1 << 22), exponents << 23)
    return jax.lax.bitcast_convert_type(jnp.where(exponents == 255, jnp.uint32(0x7FC00000), bits), jnp.float32)


def dequantize_blocks(weight: jax.Array, scale: jax.Array) -> jax.Array:
    """The inverse of `quantize_blocks` up to its rounding -> f32[..., N, K]."""
    blocks = _weight_blocks(weight) * jnp.expand_dims(scale, (-3, -1))
    return reshape_trailing(blocks, weight.ndim - 2, *weight.shape[-2:])


def _weight_blocks(weight: jax.Array) -> jax.Array:
    n, k = weight.shape[-2:]
    blocks = n // WEIGHT_BLOCK, WEIGHT_BLOCK, k // WEIGHT_BLOCK, WEIGHT_BLOCK
    return reshape_trailing(jnp.asarray(weight, jnp.float32), weight.ndim - 2, *blocks)


def _blocked(x: jax.Array, size: int) -> jax.Array:
    return jnp.asarray(x, jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _token_scale(amax: jax.Array) -> jax.Array:
    return divide(jnp.maximum(amax, TOKEN_AMAX_FLOOR), E4M3_MAX)


def _amax(blocks: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(blocks), axis=-1)
