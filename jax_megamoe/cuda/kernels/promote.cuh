// A partial sum of the tensor core, times its tokens' scales, is added to sums in FP32.
#pragma once

namespace megamoe {

// Of eight tokens: a thread's sums of two of them, in two rows.
__device__ __forceinline__ void promote(const float2& token_scales, const float* partial, float* acc) {
  acc[0] = fmaf(token_scales.x, partial[0], acc[0]);
  acc[1] = fmaf(token_scales.y, partial[1], acc[1]);
  acc[2] = fmaf(token_scales.x, partial[2], acc[2]);
  acc[3] = fmaf(token_scales.y, partial[3], acc[3]);
}

}  // namespace megamoe
