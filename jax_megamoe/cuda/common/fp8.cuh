// E4M3 conversions and the two scale formulas of the numerics contract (docs/numerics.md).
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace megamoe::fp8 {

constexpr float kMaxE4m3 = 448.0f;

__device__ __forceinline__ uint16_t pack2(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

// x / divisor, correctly rounded (Markstein: a correctly rounded reciprocal, a quotient from it, and one correction by
// the exact remainder), but for quotients far below FP8's least number.
__device__ __forceinline__ float quotient(float x, float divisor, float reciprocal) {
  const float estimate = x * reciprocal;
  return fmaf(fmaf(-estimate, divisor, x), reciprocal, estimate);
}

// 1 / x, correctly rounded, without the branches that __frcp_rn has for numbers beyond 2^-126 to 2^126.
__device__ __forceinline__ float reciprocal(float x) {
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(x));
  return fmaf(estimate, -fmaf(estimate, x, -1.0f), estimate);
}

// Tokens: one FP32 scale per token and 128 hidden columns. An infinite amax gives NaN.
__device__ __forceinline__ float token_scale(float amax) {
  return quotient(fmaxf(amax, 1e-4f), kMaxE4m3, 1.0f / kMaxE4m3);
}

// Activations between the two GEMMs: the power of two 2^ceil(log2(max(amax, 1e-30) / 448)), per token and 64 or 128
// intermediate columns. 448 is 1.75 * 2^8, so that the exponent field minus 8 is it, plus one where the mantissa
// exceeds 1.75. An infinite amax gives an infinite scale.
__device__ __forceinline__ float activation_scale(float amax) {
  const uint32_t bits = __float_as_uint(fmaxf(amax, 1e-30f));
  const uint32_t above = 0x7fffff - 0x600000;  // 1.75 has mantissa 0x600000
  const uint32_t scale = ((bits + above) & 0x7f800000u) - (8u << 23);
  return __uint_as_float(bits < 0x7f800000u ? scale : 0x7f800000u);
}

// 1 / scale for a power of two; exact, so that multiplying equals dividing. The floor of 1e-30 keeps it finite. An
// overflow to infinity upstream stays visible: its scale is infinite and has zero here, which makes NaN of infinity and
// zeros of the rest.
__device__ __forceinline__ float reciprocal_of_power_of_two(float scale) {
  return __int_as_float(max(0x7f000000 - __float_as_int(scale), 0));
}

}  // namespace megamoe::fp8
