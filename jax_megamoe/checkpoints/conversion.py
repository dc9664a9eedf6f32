"""From matrices as a checkpoint holds them to the leaves of `ExpertWeights`, on the device."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_megamoe import mxfp4, quantization
from jax_megamoe.checkpoints.encodings import Encoding
from jax_megamoe.checkpoints.experts import Raw
from jax_megamoe.checkpoints.safetensors import Array
from jax_megamoe.operands import Leaves
from jax_megamoe.packing import pack_leaves
from jax_megamoe.padding import pad_rows
from jax_megamoe.quantized_packing import quantize_and_pack
from jax_megamoe.weight_checks import Order
from jax_megamoe.weight_layout import BLOCK, Format, padded_size, reshape_trailing

# E2M1 * 2^s is an E4M3 value, whatever the E2M1 value, for s from -8 (0.5 * 2^-8 is the smallest subnormal) to 6 (384).
_MIN_SHIFT, _MAX_SHIFT = -8, 6
SPREAD_IN_BLOCK = _MAX_SHIFT - _MIN_SHIFT


def _pairs() -> Array:
    """Two E4M3 bytes for each shift and byte of two codes: uint16 [shifts * 256], the low code's in the low byte."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([magnitudes, -magnitudes]) * np.exp2(np.arange(_MIN_SHIFT, _MAX_SHIFT + 1))[:, None]
    octets = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(np.uint16)
    byte = np.arange(256)
    pairs: Array = (octets[:, byte & 15] | octets[:, byte >> 4] << 8).reshape(-1)
    return pairs


_E4M3_PAIRS = _pairs()


def can_become(encoding: Encoding, format: Format) -> bool:
    """Whether `pack` makes this format of matrices so encoded, without rounding what some format holds exactly."""
    return encoding.format in (None, format) or (encoding.format, format) == ("mxfp4", "fp8_block")


def pack(raw: Raw, *, encoding: Encoding, order: Order, format: Format) -> tuple[Leaves, jax.Array]:
    """The packed leaves of experts [n, ...], and bool[1], whether one of them cannot be held in the format."""
    has_biases = raw.gate_bias is not None
    gate_up_bias = jnp.concatenate([raw.gate_bias, raw.up_bias], axis=1) if has_biases else None
    biases = gate_up_bias, raw.down_bias
    if encoding.format is None:
        pairs = ((raw.gate, raw.gate_scale), (raw.up, raw.up_scale), (raw.down, raw.down_scale))
        gate, up, down = (weight if scale is None else _dequantize(weight, scale) for weight, scale in pairs)
        leaves = quantize_and_pack(gate, up, down, *biases, order=order, format=format)
        return leaves, _has_nan_rows(leaves) if format == "mxfp4" else _no(leaves)
    if (encoding.format, format) == ("mxfp4", "fp8_block"):
        matrices = (raw.gate, raw.gate_scale), (raw.up, raw.up_scale), (raw.down, raw.down_scale)
        (gate, up, down), (gate_scale, up_scale, down_scale), are_lost = zip(
            *(to_fp8_blocks(*_pad(*matrix)) for matrix in matrices), strict=True
        )
        gate_up, gate_up_scale = jnp.concatenate([gate, up], axis=1), jnp.concatenate([gate_scale, up_scale], axis=1)
        leaves = pack_leaves(Leaves(gate_up, gate_up_scale, down, down_scale), format="fp8_block")
        return leaves, jnp.any(jnp.concatenate(are_lost), keepdims=True)
    gate_up = jnp.concatenate([raw.gate, raw.up], axis=1)
    down = jnp.asarray(raw.down)
    if encoding.format == "mxfp4":
        gate_up_scale, down_scale = jnp.concatenate([raw.gate_scale, raw.up_scale], axis=1), jnp.asarray(raw.down_scale)
        leaves = pack_leaves(Leaves(gate_up, gate_up_scale, down, down_scale), *biases, format="mxfp4")
        return leaves, _has_nan_rows(leaves)
    gate_up, down = (jax.lax.bitcast_convert_type(octets, jnp.float8_e4m3fn) for octets in (gate_up, down))
    if format == "fp8_channel":
        gate_scale, up_scale = (_of_rows(s, raw.gate.shape[1]) for s in (raw.gate_scale, raw.up_scale))
        down_scale = _of_rows(raw.down_scale, down.shape[1])
    else:
        gate_scale, up_scale, down_scale = raw.gate_scale, raw.up_scale, jnp.asarray(raw.down_scale)
    gate_up_scale = jnp.concatenate([gate_scale, up_scale], axis=1)
    leaves = pack_leaves(Leaves(gate_up, gate_up_scale, down, down_scale), *biases, format=format)
    return leaves, _no(leaves)


def _pad(codes: jax.Array, exponents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A matrix of MXFP4 with zeros behind its rows and columns, up to the next multiples of 128."""
    num_rows, num_columns = padded_size(codes.shape[1]), padded_size(2 * codes.shape[2])
    codes = pad_rows(pad_rows(jnp.asarray(codes), 1, num_rows), 2, num_columns // 2)
    return codes, pad_rows(pad_rows(jnp.asarray(exponents), 1, num_rows), 2, num_columns // mxfp4.GROUP)


def to_fp8_blocks(codes: jax.Array, exponents: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """MXFP4 [n, N, K/2], [n, N, K/32] -> f8e4m3fn[n, N, K], f32[n, N/128, K/128] of the same values, and bool[n].

    The last says of each matrix whether it has a block with exponents that spread over more than 14 binades, or one of
    255 (NaN): FP8 cannot hold that exactly. Exponents of groups of zeros do not count.
    """
    count, num_rows, num_groups = exponents.shape
    e = exponents.astype(jnp.int32)
    is_zero = mxfp4.are_zero_groups(codes)
    blocks = num_rows // BLOCK, BLOCK, num_groups * mxfp4.GROUP // BLOCK, BLOCK // mxfp4.GROUP
    largest = jnp.max(reshape_trailing(jnp.where(is_zero, -1, e), 1, *blocks), axis=(2, 4))
    # At least 2^-126: below it numbers are subnormal in FP32, and arithmetic may take them for zero.
    scale_e = jnp.where(largest < 0, mxfp4.ONE_EXPONENT, jnp.maximum(largest - _MAX_SHIFT, 1))
    of_groups = jnp.broadcast_to(scale_e[:, :, None, :, None], (count, *blocks))
    shift = jnp.where(is_zero, 0, e - reshape_trailing(of_groups, 1, num_rows, num_groups))
    is_lost = jnp.any((shift < _MIN_SHIFT) | (shift > _MAX_SHIFT) | (e == mxfp4.NAN_EXPONENT), axis=(1, 2))
    # Looked up: computing each value takes a CPU fifty times as long.
    row = (jnp.clip(shift, _MIN_SHIFT, _MAX_SHIFT) - _MIN_SHIFT).astype(jnp.uint16)
    pairs = reshape_trailing(codes, 2, num_groups, mxfp4.GROUP // 2).astype(jnp.uint16)
    values = jnp.take(jnp.asarray(_E4M3_PAIRS), pairs + 256 * row[..., None], mode="clip")
    values = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
    scale = quantization.widen_scale(scale_e.astype(jnp.uint8))
    return reshape_trailing(values, 2, num_groups * mxfp4.GROUP), scale, is_lost


def explain_exponents(codes: Array, exponents: Array | None, format: Format, of: str = "") -> str | None:
    """What is wrong with a matrix of MXFP4, uint8 [N, K/2] and [N, K/32], where `pack` finds that something is.

    `of` says whose rows they are.
    """
    assert exponents is not None
    num_rows, num_groups = exponents.shape
    e = exponents.view(np.uint8).astype(int)
    is_zero = ~(codes.reshape(num_rows, num_groups, -1) & 0x77).any(axis=-1)
    if (nan_rows := np.flatnonzero((e == mxfp4.NAN_EXPONENT).any(axis=1))).size:
        return (
            f"has an exponent of 255, which is NaN, in row {nan_rows[0]}{of}, wanted 0 to 254: take it from its source."
        )
    # Parts of the matrix whose exponents are held relative to one of them.
    rows, groups, limit = 1, num_groups, mxfp4.SPREAD
    if format == "fp8_block":
        rows, groups, limit = BLOCK, BLOCK // mxfp4.GROUP, SPREAD_IN_BLOCK
    for row in range(0, num_rows, rows):
        for group in range(0, num_groups, groups):
            part = np.s_[row : row + rows, group : group + groups]
            used = e[part][~is_zero[part]]
            if used.size and used.max() - used.min() > limit:
                advice = 'load it with format="mxfp4"' if rows > 1 else "make zeros of the groups too small to matter"
                where = f"rows {row} to {row + rows - 1}" if rows > 1 else f"row {row}"
                return (
                    f"has exponents from {used.min()} to {used.max()} in {where}{of}, wanted at most {limit} between "
                    f"the smallest and the largest for {format}: {advice}."
                )
    return None


def _dequantize(octets: jax.Array, scale: jax.Array) -> jax.Array:
    """E4M3 as bytes [n, N, K] times powers of two [n, N/b, K/c] -> bf16[n, N, K], exactly."""
    count, num_rows, num_columns = octets.shape
    blocks = scale.shape[1], num_rows // scale.shape[1], scale.shape[2], num_columns // scale.shape[2]
    values = jax.lax.bitcast_convert_type(jnp.asarray(octets), jnp.float8_e4m3fn).astype(jnp.float32)
    products = reshape_trailing(values, 1, *blocks) * quantization.widen_scale(jnp.asarray(scale))[:, :, None, :, None]
    return reshape_trailing(products, 1, num_rows, num_columns).astype(jnp.bfloat16)


def _of_rows(scale: jax.Array, num_rows: int) -> jax.Array:
    """Scales [n], [n, 1], [n, N] or [n, N, 1] -> [n, N]."""
    count = scale.shape[0]
    scale = reshape_trailing(jnp.asarray(scale), 1, scale.size // count)
    return jnp.broadcast_to(scale, (count, num_rows))


def _has_nan_rows(leaves: Leaves) -> jax.Array:
    is_nan = [jnp.any(jnp.isnan(scale)) for scale in (leaves.gate_up_scale, leaves.down_scale)]
    return jnp.expand_dims(is_nan[0] | is_nan[1], 0)


def _no(leaves: Leaves) -> jax.Array:
    # Made of a leaf: inside `shard_map` it has to vary over devices as the others do.
    return jnp.logical_and(jnp.isnan(leaves.gate_up_scale[:1, 0, 0, 0]), False)
