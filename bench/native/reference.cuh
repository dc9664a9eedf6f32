// The numerics of docs/numerics.md as naive kernels over the packed weights: one thread per output, nothing shared with
// the fused kernel but the formulas. Slow on purpose.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "layout/weight_format.h"

namespace probe {

struct Sizes {
  int tokens, top_k, hidden, inter, experts;
  megamoe::WeightFormat format;

  __device__ bool has_row_scales() const { return format != megamoe::WeightFormat::kFp8Block; }
  __device__ size_t plane_bytes() const { return format == megamoe::WeightFormat::kMxfp4 ? 4352 : 8192; }
};

__device__ inline float e4m3_to_float(uint8_t byte) {
  __nv_fp8_e4m3 value;
  value.__x = byte;
  return static_cast<float>(value);
}

__device__ inline uint8_t float_to_e4m3(float value) { return __nv_fp8_e4m3(value).__x; }

// Position of (row, k) inside a 64 x 128 plane.
__device__ inline int plane_byte(int row, int k) { return row * 128 + (((k / 16) ^ (row % 8)) * 16) + k % 16; }

// The weight at (row, k) of a plane, but for scales of blocks or rows.
__device__ inline float weight(const Sizes& s, const uint8_t* plane, int row, int k) {
  if (s.format != megamoe::WeightFormat::kMxfp4) return e4m3_to_float(plane[plane_byte(row, k)]);
  const int half = k / 64, quad = k % 64 / 16, step = k % 16 / 8, high = k % 8 / 4, i = k % 4;
  const int word = half * 512 + row / 16 * 128 + (row % 8 * 4 + quad) * 4 + step * 2 + row % 16 / 8;
  const uint32_t bits = reinterpret_cast<const uint32_t*>(plane)[word];
  const float magnitudes[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  const float magnitude = magnitudes[bits >> (16 * high + 4 * i) & 7];
  const bool negative = bits >> (8 * i + (high ? 3 : 7)) & 1;
  const int exponent = plane[4096 + row / 16 * 64 + row % 8 * 8 + k % 64 / 32 * 4 + half * 2 + row % 16 / 8];
  return ldexpf(negative ? -magnitude : magnitude, exponent - 13);
}

// Quantised tokens as floats, and their scales.
__global__ void quantize(Sizes s, const __nv_bfloat16* x, float* values, float* scales) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= s.tokens * (s.hidden / 128)) return;
  const __nv_bfloat16* block = x + static_cast<size_t>(index) * 128;
  float amax = 0;
  for (int i = 0; i < 128; ++i) amax = fmaxf(amax, fabsf(__bfloat162float(block[i])));
  const float scale = fmaxf(amax, 1e-4f) / 448.0f;
  scales[index] = scale;
  for (int i = 0; i < 128; ++i) {
    values[static_cast<size_t>(index) * 128 + i] = e4m3_to_float(float_to_e4m3(__bfloat162float(block[i]) / scale));
  }
}

__global__ void gate_up(Sizes s, const float* values, const float* scales, const uint8_t* weights,
                        const float* weight_scales, const int* ids, const float* routing, float clamp, float factor,
                        float* h) {
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  const int pair = blockIdx.x;
  const int expert = ids[pair];
  if (column >= s.inter || expert < 0 || expert >= s.experts) return;
  const int token = pair / s.top_k, blocks = s.hidden / 128, tile = column / 64, within = column % 64;
  const int plane = within / 32, row = within % 32 / 8 * 16 + within % 8;
  float gate = 0, up = 0;
  for (int kb = 0; kb < blocks; ++kb) {
    const size_t block = (static_cast<size_t>(expert) * (s.inter / 64) + tile) * blocks + kb;
    const uint8_t* w = weights + (block * 2 + plane) * s.plane_bytes();
    float g = 0, u = 0;
    for (int k = 0; k < 128; ++k) {
      const float v = values[static_cast<size_t>(token) * s.hidden + kb * 128 + k];
      g += v * weight(s, w, row, k);
      u += v * weight(s, w, row + 8, k);
    }
    const float scale = scales[static_cast<size_t>(token) * blocks + kb];
    gate += g * (scale * (s.has_row_scales() ? 1.0f : weight_scales[block * 4]));
    up += u * (scale * (s.has_row_scales() ? 1.0f : weight_scales[block * 4 + 1]));
  }
  if (s.has_row_scales()) {
    const float* terms =
        weight_scales + ((static_cast<size_t>(expert) * (s.inter / 64) + tile) * 128 + plane * 64 + within % 32) * 2;
    gate = gate * terms[0] + terms[64];
    up = up * terms[1] + terms[65];
  }
  gate = fminf(gate, clamp);
  up = fminf(fmaxf(up, -clamp), clamp);
  h[static_cast<size_t>(pair) * s.inter + column] = gate / (1 + expf(-gate)) * up * (routing[pair] * factor);
}

__global__ void requantize(Sizes s, float* h, float* scales) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= s.tokens * s.top_k * (s.inter / 64)) return;
  float* block = h + static_cast<size_t>(index) * 64;
  float amax = 0;
  for (int i = 0; i < 64; ++i) amax = fmaxf(amax, fabsf(block[i]));
  const float scale = exp2f(ceilf(log2f(fmaxf(amax, 1e-30f) / 448.0f)));
  scales[index] = scale;
  for (int i = 0; i < 64; ++i) block[i] = e4m3_to_float(float_to_e4m3(block[i] / scale));
}

__global__ void down(Sizes s, const float* h, const float* scales, const uint8_t* weights, const float* weight_scales,
                     const int* ids, const float* routing, float factor, float* out) {
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  const int pair = blockIdx.x;
  const int expert = ids[pair];
  if (column >= s.hidden || expert < 0 || expert >= s.experts) return;
  const int blocks = s.inter / 128, tile = column / 64, within = column % 64;
  const int row = within / 16 * 16 + within % 16 / 2 + within % 2 * 8;
  float sum = 0;
  for (int kb = 0; kb < blocks; ++kb) {
    const size_t base = static_cast<size_t>(expert) * (s.hidden / 64) + tile;
    const uint8_t* w = weights + (base * blocks + kb) * s.plane_bytes();
    const float ws = s.has_row_scales() ? 1.0f : weight_scales[(base * ((blocks + 1) / 2) + kb / 2) * 4 + kb % 2];
    for (int half = 0; half < 2; ++half) {
      float partial = 0;
      for (int k = half * 64; k < half * 64 + 64; ++k) {
        partial += h[static_cast<size_t>(pair) * s.inter + kb * 128 + k] * weight(s, w, row, k);
      }
      sum += partial * (scales[static_cast<size_t>(pair) * (s.inter / 64) + kb * 2 + half] * ws);
    }
  }
  if (s.has_row_scales()) {
    const float* terms = weight_scales + (static_cast<size_t>(expert) * (s.hidden / 64) + tile) * 128 + within;
    sum = sum * terms[0] + routing[pair] * factor * terms[64];
  }
  out[static_cast<size_t>(pair) * s.hidden + column] = __bfloat162float(__float2bfloat16(sum));
}

__global__ void combine(Sizes s, const float* out, const int* ids, float* y) {
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  const int token = blockIdx.x;
  if (column >= s.hidden) return;
  float sum = 0;
  for (int slot = 0; slot < s.top_k; ++slot) {
    const int pair = token * s.top_k + slot;
    if (ids[pair] < 0 || ids[pair] >= s.experts) continue;
    sum += out[static_cast<size_t>(pair) * s.hidden + column];
  }
  y[static_cast<size_t>(token) * s.hidden + column] = sum;
}

}  // namespace probe
