// Time (PTX ISA, "Special Registers": %globaltimer, %clock64).
#pragma once

#include <cstdint>

namespace megamoe::ptx {

__device__ __forceinline__ uint64_t global_nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

// Of this SM.
__device__ __forceinline__ int64_t cycles() {
  int64_t count;
  asm volatile("mov.u64 %0, %clock64;" : "=l"(count));
  return count;
}

}  // namespace megamoe::ptx
