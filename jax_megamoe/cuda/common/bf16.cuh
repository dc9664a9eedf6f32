// Eight bf16 numbers in a vector, as rows of x and of results are loaded.
#pragma once

#include <cstdint>

namespace megamoe::bf16 {

// Number `i`, which the compiler has to know: the upper half of an FP32 number.
__device__ __forceinline__ float value(const uint4& eight, int i) {
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
  return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
}

}  // namespace megamoe::bf16
