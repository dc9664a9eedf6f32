// Flags that other GPUs write or read: system scope, and waits that end.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace megamoe::ptx {

// Everything this thread wrote before, or has observed, is visible to whoever observes what it writes later. __threadfence_system
// would also order it among all such fences, which nobody needs, and takes longer.
__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Everything this thread wrote before, and what it has observed of other threads through a barrier, is visible to whoever
// reads the value with `load_acquire_system`.
__device__ __forceinline__ void store_release_system(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ __forceinline__ void add_release_system(uint64_t* counter, uint64_t value) {
  asm volatile("red.release.sys.global.add.u64 [%0], %1;" ::"l"(counter), "l"(value) : "memory");
}

__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ uint64_t load_relaxed_system(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed_system(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

// Waits until the flag is at least `target`, for `limit` nanoseconds at most. Returns whether it came, and what was seen
// last. The timer is read now and then only: it is slower than the flag.
__device__ __forceinline__ bool wait_system(const uint64_t* flag, uint64_t target, uint64_t limit, uint64_t* seen) {
  uint64_t start = 0;
  for (uint32_t spins = 0;; ++spins) {
    *seen = load_acquire_system(flag);
    if (*seen >= target) return true;
    if ((spins & 0x3ff) != 0x3ff) continue;
    const uint64_t now = global_nanoseconds();
    if (start == 0) start = now;
    if (now - start > limit) return false;
  }
}

}  // namespace megamoe::ptx
