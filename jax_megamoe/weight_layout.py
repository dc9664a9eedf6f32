"""The memory layouts in which the kernel reads the weights, one for each format, and the way there and back.

| format      | tag                 | a weight is                                       | bits a weight |
|-------------|---------------------|---------------------------------------------------|---------------|
| fp8_block   | sm90_v1             | E4M3 * f32 scale of its block of 128x128          | 8             |
| fp8_channel | sm90_fp8_channel_v2 | E4M3 * f32 scale of its row                       | 8             |
| mxfp4       | sm90_mxfp4_v3       | E2M1 * 2^(E8M0 - 127) of its 32 columns of a row  | 4.25          |

The kernel streams *planes*: 64 rows of 128 consecutive K. Of FP8 they are 8192 bytes, stored as the image that shared
memory holds under the 128-byte swizzle: in row r the 16-byte chunk c lies at chunk position c ^ (r % 8), so a plane is
copied by one bulk transfer and WGMMA reads it without bank conflicts. Of MXFP4 they are 4352 bytes, stored as the
threads hold them in registers (`mxfp4` has the bits).

| leaf          | format            | shape                     | content                                            |
|---------------|-------------------|---------------------------|----------------------------------------------------|
| gate_up       | FP8               | [E, I/64, H/128, 16384]   | planes p of 64 columns t; row 16g + q: column      |
|               | mxfp4             | [E, I/64, H/128, 8704]    | 64t + 32p + 8g + q%8 of gate if q < 8, else of up  |
| gate_up_scale | fp8_block         | [E, I/64, H/128, 4]       | (gate, up, 0, 0)                                   |
|               | fp8_channel,mxfp4 | [E, I/64, 128, 2]         | (gate, up) of a plane's 32 columns, then biases    |
| down          | FP8               | [E, H/64, I/128, 8192]    | row 16g + q: hidden row 64t + 16g + 2(q%8) + q//8  |
|               | mxfp4             | [E, H/64, I/128, 4352]    |                                                    |
| down_scale    | fp8_block         | [E, H/64, ceil(I/256), 4] | (I block 2j, 2j + 1 or 0 past the end, 0, 0)       |
|               | fp8_channel,mxfp4 | [E, H/64, 64, 2]          | pairs of hidden rows of a plane, then biases       |

Rows q and q + 8 of an accumulator belong to one WGMMA thread: it holds a column's gate beside its up, and two
neighbouring hidden columns of the result. Biases are added to a row's sum over K, after its scale. H and I are
multiples of 128 here: leaves of other sizes are those of the next multiples, with zeros behind. All functions take any
leading dimensions (experts, or layers and experts), move bytes only, and are exact inverses of each other. They use no
gather, so they run on operands sharded over the leading dimensions. FP8 arrays may come as their bytes.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_megamoe.arrays import text_of
from jax_megamoe.errors import LayoutError
from jax_megamoe.operands import Leaves

Format = Literal["fp8_block", "fp8_channel", "mxfp4"]

LAYOUT_TAGS: dict[Format, str] = {
    "fp8_block": "sm90_v1",
    "fp8_channel": "sm90_fp8_channel_v2",
    "mxfp4": "sm90_mxfp4_v3",
}
LEAF_DTYPES: dict[Format, Leaves] = {
    "fp8_block": Leaves(jnp.float8_e4m3fn, jnp.float32, jnp.float8_e4m3fn, jnp.float32),
    "fp8_channel": Leaves(jnp.float8_e4m3fn, jnp.float32, jnp.float8_e4m3fn, jnp.float32),
    "mxfp4": Leaves(jnp.uint8, jnp.float32, jnp.uint8, jnp.float32),
}

BLOCK = 128  # K of a plane; a scale of fp8_block covers BLOCK x BLOCK weights
PLANE_ROWS = 64
PLANE_BYTES = PLANE_ROWS * BLOCK  # of FP8
MXFP4_PLANE_BYTES = PLANE_BYTES // 2 + PLANE_BYTES // 32  # two values a byte, one exponent for 32 values
# Elements of one row of a block scale leaf: the kernel loads 16 aligned bytes.
SCALES_PER_ROW = 4


def padded_size(size: int) -> int:
    """The next multiple of 128: what a hidden or an intermediate size is in the leaves."""
    return -(-size // BLOCK) * BLOCK


def leaf_shapes(format: Format, num_experts: int, hidden_size: int, intermediate_size: int) -> Leaves:
    """The shapes of the packed leaves of `num_experts` experts (E, or E_local on one device), of any H and I."""
    e, h, i = num_experts, padded_size(hidden_size), padded_size(intermediate_size)
    plane = MXFP4_PLANE_BYTES if format == "mxfp4" else PLANE_BYTES
    is_block = format == "fp8_block"
    return Leaves(
        gate_up=(e, i // PLANE_ROWS, h // BLOCK, 2 * plane),
        gate_up_scale=(e, i // PLANE_ROWS, *((h // BLOCK, SCALES_PER_ROW) if is_block else (2 * PLANE_ROWS, 2))),
        down=(e, h // PLANE_ROWS, i // BLOCK, plane),
        down_scale=(
            e,
            h // PLANE_ROWS,
            *((-(-i // (2 * BLOCK)), SCALES_PER_ROW) if is_block else (PLANE_ROWS, 2)),
        ),
    )


def format_of(leaves: Leaves) -> Format:
    """The format of packed leaves: arrays, tracers, or their types. Raises `LayoutError` for other things.

    Not of leaves whose FP8 was turned into bytes: those look like MXFP4.
    """
    scales_per_row = leaves.gate_up_scale.shape[-1]
    if leaves.gate_up.dtype == jnp.uint8:
        return "mxfp4"
    if scales_per_row == SCALES_PER_ROW:
        return "fp8_block"
    if scales_per_row == 2:
        return "fp8_channel"
    raise LayoutError(
        f"gate_up_scale has shape {leaves.gate_up_scale.shape}, wanted a last dimension of 4 (fp8_block) or 2 "
        "(fp8_channel): pass the leaves of ExpertWeights."
    )


def format_of_tag(tag: str) -> Format:
    """The format whose layout has this tag. Raises `LayoutError` for tags of other versions."""
    for format, known in LAYOUT_TAGS.items():
        if tag == known:
            return format
    *others, last = map(repr, LAYOUT_TAGS.values())
    raise LayoutError(
        f"weights have layout {text_of(tag)}, this version wants {', '.join(others)} or {last}: "
        "unpack them with the version that wrote them and call pack_experts."
    )


def _bytes(values: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(values, jnp.uint8)


def _fp8(values: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)


def permute_trailing(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """Transposes the last so many dimensions."""
    lead = x.ndim - len(order)
    return x.transpose(*range(lead), *(lead + axis for axis in order))


def reshape_trailing(x: jax.Array, num_lead: int, *sizes: int) -> jax.Array:
    """Reshapes all but the first `num_lead` dimensions, which keep their sharding (explicit mode has to be told)."""
    shape = (*x.shape[:num_lead], *sizes)
    sharding = jax.typeof(x).sharding
    if all(axis is None for axis in sharding.spec):
        return x.reshape(shape)
    # With the mesh of the type itself: there may be none in the context.
    spec = PartitionSpec(*sharding.spec[:num_lead], *(None for _ in sizes))
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def _swizzle(x: jax.Array) -> jax.Array:
    """x[..., q, c, :] -> x[..., q, c ^ q, :], q and c below 8; its own inverse.

    Exchanging the halves of one bit of c where the same bit of q is set, bit by bit, is the whole of the XOR.
    """
    lead = x.ndim - 3
    bits = reshape_trailing(x, lead, 2, 2, 2, 2, 2, 2, x.shape[-1])
    for bit in range(3):
        is_set = jnp.expand_dims(jnp.arange(2) == 1, [axis for axis in range(bits.ndim) if axis != lead + bit])
        bits = jnp.where(is_set, jnp.flip(bits, lead + 3 + bit), bits)
    return reshape_trailing(bits, lead, *x.shape[lead:])


def pack_gate_up(gate_up: jax.Array) -> jax.Array:
    """f8[..., 2I, H], gate rows first -> f8[..., I/64, H/128, 16384]."""
    lead = gate_up.ndim - 2
    tiles, blocks = gate_up.shape[-2] // (2 * PLANE_ROWS), gate_up.shape[-1] // BLOCK
    # gate or up, tile, plane, g, q % 8, K block, chunk, byte
    x = reshape_trailing(_bytes(gate_up), lead, 2, tiles, 2, 4, 8, blocks, 8, 16)
    x = _swizzle(permute_trailing(x, (1, 5, 2, 3, 0, 4, 6, 7)))
    return _fp8(reshape_trailing(x, lead, tiles, blocks, 2 * PLANE_BYTES))


def unpack_gate_up(packed: jax.Array) -> jax.Array:
    """The inverse of `pack_gate_up`: f8[..., I/64, H/128, 16384] -> f8[..., 2I, H]."""
    lead = packed.ndim - 3
    tiles, blocks = packed.shape[lead : lead + 2]
    # tile, K block, plane, g, gate or up, q % 8, chunk, byte
    x = _swizzle(reshape_trailing(_bytes(packed), lead, tiles, blocks, 2, 4, 2, 8, 8, 16))
    x = permute_trailing(x, (4, 0, 2, 3, 5, 1, 6, 7))
    return _fp8(reshape_trailing(x, lead, 2 * tiles * PLANE_ROWS, blocks * BLOCK))


def pack_gate_up_scale(scale: jax.Array) -> jax.Array:
    """f32[..., 2I/128, H/128], gate first -> f32[..., I/64, H/128, 4]."""
    lead = scale.ndim - 2
    rows, blocks = scale.shape[-2:]
    x = reshape_trailing(scale, lead, 2, rows // 2, blocks)
    return _pad_last(jnp.moveaxis(_twice(x, -2), -3, -1), SCALES_PER_ROW)


def unpack_gate_up_scale(packed: jax.Array) -> jax.Array:
    """The inverse of `pack_gate_up_scale`: f32[..., I/64, H/128, 4] -> f32[..., 2I/128, H/128]."""
    lead = packed.ndim - 3
    tiles, blocks = packed.shape[lead : lead + 2]
    return reshape_trailing(jnp.moveaxis(packed[..., ::2, :, :2], -1, -3), lead, tiles, blocks)


def pack_down(down: jax.Array) -> jax.Array:
    """f8[..., H, I] -> f8[..., H/64, I/128, 8192]."""
    lead = down.ndim - 2
    tiles, blocks = down.shape[-2] // PLANE_ROWS, down.shape[-1] // BLOCK
    # tile, g, q % 8, q // 8, K block, chunk, byte
    x = reshape_trailing(_bytes(down), lead, tiles, 4, 8, 2, blocks, 8, 16)
    x = _swizzle(permute_trailing(x, (0, 4, 1, 3, 2, 5, 6)))
    return _fp8(reshape_trailing(x, lead, tiles, blocks, PLANE_BYTES))


def unpack_down(packed: jax.Array) -> jax.Array:
    """The inverse of `pack_down`: f8[..., H/64, I/128, 8192] -> f8[..., H, I]."""
    lead = packed.ndim - 3
    tiles, blocks = packed.shape[lead : lead + 2]
    # tile, K block, g, q // 8, q % 8, chunk, byte
    x = _swizzle(reshape_trailing(_bytes(packed), lead, tiles, blocks, 4, 2, 8, 8, 16))
    x = permute_trailing(x, (0, 2, 4, 3, 1, 5, 6))
    return _fp8(reshape_trailing(x, lead, tiles * PLANE_ROWS, blocks * BLOCK))


def pack_down_scale(scale: jax.Array) -> jax.Array:
    """f32[..., H/128, I/128] -> f32[..., H/64, ceil(I/256), 4]."""
    rows, blocks = scale.shape[-2:]
    pairs = -(-blocks // 2)
    x = reshape_trailing(_pad_last(scale, 2 * pairs), scale.ndim - 2, rows, pairs, 2)
    return _pad_last(_twice(x, -3), SCALES_PER_ROW)


def unpack_down_scale(packed: jax.Array, intermediate_size: int) -> jax.Array:
    """The inverse of `pack_down_scale`: f32[..., H/64, ceil(I/256), 4] -> f32[..., H/128, I/128]."""
    lead = packed.ndim - 3
    tiles, pairs = packed.shape[lead : lead + 2]
    x = reshape_trailing(packed[..., ::2, :, :2], lead, tiles // 2, 2 * pairs)
    return x[..., : intermediate_size // BLOCK]


def pack_gate_up_row_scale(scale: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """f32[..., 2I] of rows' scales and biases (None: zeros), gate rows first -> f32[..., I/64, 128, 2]."""
    return _join_rows(_gate_up_pairs, scale, bias)


def unpack_gate_up_row_scale(packed: jax.Array) -> jax.Array:
    """The scales of `pack_gate_up_row_scale`: f32[..., I/64, 128, 2] -> f32[..., 2I]."""
    return _gate_up_rows(_split_rows(packed, 0))


def unpack_gate_up_bias(packed: jax.Array) -> jax.Array:
    """The biases of `pack_gate_up_row_scale`: f32[..., I/64, 128, 2] -> f32[..., 2I]."""
    return _gate_up_rows(_split_rows(packed, 1))


def pack_down_row_scale(scale: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """f32[..., H] of rows' scales and biases (None: zeros) -> f32[..., H/64, 64, 2]."""
    return _join_rows(_down_pairs, scale, bias)


def unpack_down_row_scale(packed: jax.Array) -> jax.Array:
    """The scales of `pack_down_row_scale`: f32[..., H/64, 64, 2] -> f32[..., H]."""
    return _down_rows(_split_rows(packed, 0))


def unpack_down_bias(packed: jax.Array) -> jax.Array:
    """The biases of `pack_down_row_scale`: f32[..., H/64, 64, 2] -> f32[..., H]."""
    return _down_rows(_split_rows(packed, 1))


def _join_rows(pairs: Callable[[jax.Array], jax.Array], scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    """What `pairs` makes of both, [..., tiles, planes, 32, 2], plane by plane -> [..., tiles, planes * 64, 2]."""
    # Zeros by the scale's own type, which says how it is split over devices.
    bias = jnp.zeros_like(scale) if bias is None else bias
    joined = jnp.concatenate([pairs(scale), pairs(bias)], axis=-2)
    return reshape_trailing(joined, joined.ndim - 3, joined.shape[-3] * PLANE_ROWS, 2)


def _split_rows(packed: jax.Array, which: int) -> jax.Array:
    """The inverse of `_join_rows`: of [..., tiles, planes * 64, 2] the scales (0) or biases (1)."""
    planes = reshape_trailing(packed, packed.ndim - 2, packed.shape[-2] // PLANE_ROWS, 2, PLANE_ROWS // 2, 2)
    return jax.lax.index_in_dim(planes, which, planes.ndim - 3, keepdims=False)


def _gate_up_pairs(rows: jax.Array) -> jax.Array:
    """[..., 2I], gate rows first -> [..., I/64, 2, 32, 2]."""
    tiles = rows.shape[-1] // (2 * PLANE_ROWS)
    return permute_trailing(reshape_trailing(rows, rows.ndim - 1, 2, tiles, 2, PLANE_ROWS // 2), (1, 2, 3, 0))


def _gate_up_rows(pairs: jax.Array) -> jax.Array:
    """The inverse of `_gate_up_pairs`."""
    lead = pairs.ndim - 4
    return reshape_trailing(permute_trailing(pairs, (3, 0, 1, 2)), lead, 2 * pairs.shape[lead] * PLANE_ROWS)


def _down_pairs(rows: jax.Array) -> jax.Array:
    """[..., H] -> [..., H/64, 1, 32, 2]."""
    return reshape_trailing(rows, rows.ndim - 1, rows.shape[-1] // PLANE_ROWS, 1, PLANE_ROWS // 2, 2)


def _down_rows(pairs: jax.Array) -> jax.Array:
    """The inverse of `_down_pairs`."""
    lead = pairs.ndim - 4
    return reshape_trailing(pairs, lead, pairs.shape[lead] * PLANE_ROWS)


def _twice(x: jax.Array, axis: int) -> jax.Array:
    """Each element twice along a negative axis: both 64-row tiles of a 128-row block have its scale."""
    lead = x.ndim + axis
    x = jnp.stack([x, x], axis=lead + 1)
    return reshape_trailing(x, lead, 2 * x.shape[lead], *x.shape[lead + 2 :])


def _pad_last(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
