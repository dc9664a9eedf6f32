// What the L2 is to keep or to drop (PTX ISA, "createpolicy", "Cache Eviction Priority Hints", "discard").
#pragma once

#include <cstdint>

namespace megamoe::ptx {

// What is loaded with it leaves the L2 first.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// What is loaded or stored with it leaves the L2 last.
__device__ __forceinline__ uint64_t keep_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Stores of 4, 8 and 16 bytes that the L2 keeps longest.
__device__ __forceinline__ void store_keep(void* destination, uint32_t value) {
  asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(destination), "r"(value), "l"(keep_policy())
               : "memory");
}
__device__ __forceinline__ void store_keep(void* destination, const uint2& value) {
  asm volatile("st.global.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;" ::"l"(destination), "r"(value.x), "r"(value.y),
               "l"(keep_policy())
               : "memory");
}
__device__ __forceinline__ void store_keep(void* destination, const uint4& value) {
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(destination), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w), "l"(keep_policy())
               : "memory");
}

// As the L2 would treat it, or kept.
template <typename Value>
__device__ __forceinline__ void store(void* destination, const Value& value, bool keep) {
  if (keep) {
    store_keep(destination, value);
  } else {
    *static_cast<Value*>(destination) = value;
  }
}

constexpr int kLineBytes = 128;

// Nobody reads the line again before it is written anew: its bytes leave the L2 and are never written to the memory.
// Aligned.
__device__ __forceinline__ void discard_line(const void* line) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
}

}  // namespace megamoe::ptx
