// What the lanes of a warp, or several warps, do together (PTX ISA, "elect.sync", "redux.sync", "bar, barrier").
#pragma once

#include <cstdint>

namespace megamoe::ptx {

// The same value, which all lanes hold, in a uniform register: WGMMA takes its descriptors from there.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __reduce_max_sync(~0u, value); }

// True for one lane of a warp that has converged. Where ptxas knows that a lane is alone, it does not wrap every bulk
// copy into a loop over the lanes that might have other operands.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// A hardware barrier of the CTA, by number.
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same without waiting for the others.
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace megamoe::ptx
