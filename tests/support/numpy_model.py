"""A second model of docs/numerics.md, in NumPy and apart from the package: natural layouts, loops, GEMMs in float64.

Shares no code with `jax_megamoe`, so that one misreading of the numerics does not pass as agreement.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FP8 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
Array = np.ndarray[Any, np.dtype[Any]]


class Experts(NamedTuple):
    """Experts as checkpoints hold them: the arguments of `pack_experts`, in that order."""

    gate_up: Array  # f8[E, 2I, H]; of MXFP4 uint8 or int8 [E, 2I, H/2], or float4[E, 2I, H]
    gate_up_scale: Array  # f32[E, 2I/128, H/128], f32[E, 2I] (also 1 at the end), [E, 2] or [E]; bytes [E, 2I, H/32]
    down: Array  # f8[E, H, I] or alike
    down_scale: Array  # f32[E, H/128, I/128] or alike


def round_e4m3(values: Array) -> Array:
    """float -> f8e4m3fn, round to nearest even, saturating."""
    return np.clip(np.asarray(values, np.float32), -448, 448).astype(FP8)


def quantize_rows(values: Array, block: int, floor: float, power_of_two: bool) -> tuple[Array, Array]:
    """f32[T, N] -> f8[T, N], f32[T, N/block], up."""
    num_rows, width = values.shape
    padded = np.zeros((num_rows, -(-width // block) * block), np.float32)
    padded[:, :width] = values
    blocks = padded.reshape(num_rows, -1, block)
    scale = np.maximum(np.abs(blocks).max(-1), np.float32(floor)) / np.float32(448)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)
        power = np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)
        scale = np.where(np.isfinite(scale), power, scale)  # an infinity has no exponent
    return round_e4m3(blocks / scale[..., None]).reshape(padded.shape)[:, :width], scale


def quantize_experts(gate: Array, up: Array, down: Array) -> Experts:
    """Float [E, I, H], [E, I, H], [E, H, I] -> FP8 with a scale per 128x128 block, block by block.

    The scale is a power of two where one makes the block exact.
    """

    def quantize(weight: Array) -> tuple[Array, Array]:
        e, n, k = weight.shape
        values, scales = np.empty(weight.shape, FP8), np.empty((e, n // 128, k // 128), np.float32)
        for index in np.ndindex(scales.shape):
            expert, rows, columns = index[0], *(slice(128 * i, 128 * i + 128) for i in index[1:])
            block = weight[expert, rows, columns].astype(np.float32)
            scales[index] = np.abs(block).max() / np.float32(448) or 1
            power = np.exp2(np.ceil(np.log2(np.float64(scales[index]))))
            if np.array_equal(round_e4m3(block / power) * power, block):
                scales[index] = power
            values[expert, rows, columns] = round_e4m3(block / scales[index])
        return values, scales

    return Experts(*quantize(np.concatenate([gate, up], axis=1)), *quantize(down))


def dequantize(values: Array, scales: Array) -> Array:
    """FP8 blocks, of which the last of rows and columns may be smaller -> float64, exactly."""
    repeated = scales.astype(np.float64).repeat(128, -1).repeat(128, -2)
    return values.astype(np.float64) * repeated[..., : values.shape[-2], : values.shape[-1]]


E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def dequantize_mxfp4(values: Array, exponents: Array) -> Array:
    """Two E2M1 values in a byte, the first in the low nibble, or float4; E8M0 of 32 columns -> float64, exactly."""
    table = np.array(E2M1_VALUES + [-value for value in E2M1_VALUES])
    if values.dtype == ml_dtypes.float4_e2m1fn:
        numbers = values.astype(np.float64)
    else:
        octets = values.view(np.uint8)
        numbers = np.empty((*octets.shape[:-1], 2 * octets.shape[-1]))
        numbers[..., 0::2], numbers[..., 1::2] = table[octets % 16], table[octets // 16]
    powers = exponents.view(np.uint8).astype(np.int64)
    factors = np.where(powers == 255, np.nan, np.exp2(np.minimum(powers, 254) - 127.0))
    return numbers * factors.repeat(32, -1)


def dequantize_matrices(values: Array, scales: Array) -> Array:
    """Matrices of any of the three formats -> float64, exactly."""
    if values.dtype != FP8:
        return dequantize_mxfp4(values, scales)
    num_experts, num_rows, _ = values.shape
    if scales.ndim == 3 and scales.shape[1:] != (num_rows, 1):
        return dequantize(values, scales)
    of_parts = scales.astype(np.float64).reshape(num_experts, -1)
    return values.astype(np.float64) * of_parts.repeat(num_rows // of_parts.shape[1], 1)[..., None]


def dequantize_gate_up(values: Array, scales: Array) -> Array:
    """Gate rows, then up rows, whose blocks are their own -> float64, exactly."""
    rows = values.shape[1] // 2
    if values.dtype != FP8 or scales.shape[1:] != (2 * -(-rows // 128), -(-values.shape[2] // 128)):
        return dequantize_matrices(values, scales)
    halves = zip(np.split(values, 2, 1), np.split(scales, 2, 1), strict=True)
    return np.concatenate([dequantize(*half) for half in halves], 1)


def moe(
    x: Array,
    experts: Experts,
    topk_ids: Array,
    topk_weights: Array,
    *,
    activation_clamp: float | None = None,
    routed_scaling_factor: float = 1.0,
    activate: Callable[[Array, Array], Array] = lambda gate, up: gate / (1 + np.exp(-gate)) * up,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    activation_block: int = 64,
    num_ranks: int = 1,
    quantized: bool = True,
) -> tuple[Array, Array]:
    """x bf16[T, H], ids [T, k], weights [T, k] -> y (bf16, or float64 unless `quantized`) [T, H], load [E].

    `activate`: of gate and up, after the clamp. Biases [E, 2I], gate's first, and [E, H]. `activation_block`:
    intermediate columns that share a scale. `num_ranks`: that share the experts, and whose sums of a token's slots meet
    as BF16. Not `quantized`: the dequantised weights, with nothing rounded anywhere.
    """
    gate_up = dequantize_gate_up(experts.gate_up, experts.gate_up_scale)
    down = dequantize_matrices(experts.down, experts.down_scale)
    num_experts, hidden_size, intermediate_size = down.shape
    load = np.zeros(num_experts, np.int64)
    sums = np.zeros((num_ranks, len(x), hidden_size), np.float32 if quantized else np.float64)

    rows = x.astype(np.float64)
    if quantized:
        values, scales = quantize_rows(x.astype(np.float32), 128, 1e-4, power_of_two=False)
        rows = values.astype(np.float64) * scales.repeat(128, -1)[:, :hidden_size]
    for token, row in enumerate(rows):
        for expert, weight in zip(topk_ids[token], topk_weights[token], strict=True):
            if not 0 <= expert < num_experts:
                continue
            load[expert] += 1
            both = gate_up[expert] @ row + (0 if gate_up_bias is None else gate_up_bias[expert].astype(np.float64))
            gate, up = both[:intermediate_size], both[intermediate_size:]
            if activation_clamp is not None:
                gate, up = np.minimum(gate, activation_clamp), np.clip(up, -activation_clamp, activation_clamp)
            factor = np.float32(weight) * np.float32(routed_scaling_factor)
            activation = activate(gate, up) * factor
            if quantized:
                values, scales = quantize_rows(activation[None], activation_block, 1e-30, power_of_two=True)
                activation = (values.astype(np.float64) * scales.repeat(activation_block, -1)[:, :intermediate_size])[0]
            result = down[expert] @ activation
            if down_bias is not None:
                result = result + factor * down_bias[expert].astype(np.float64)
            rank = expert * num_ranks // num_experts
            sums[rank, token] += result.astype(BF16).astype(np.float32) if quantized else result
    if num_ranks > 1:
        sums = sums.astype(BF16).astype(np.float32)
    y = functools.reduce(np.add, sums)
    return (y.astype(BF16) if quantized else y), load
