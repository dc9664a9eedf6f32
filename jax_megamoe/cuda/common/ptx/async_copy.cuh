// A thread's own asynchronous copies (PTX ISA, "Non-bulk copy: cp.async").
#pragma once

#include <cstdint>

#include "common/ptx/address.cuh"
#include "common/ptx/cluster.cuh"

namespace megamoe::ptx {

// 16 bytes through the L2; zeros instead where `exists` is false.
__device__ __forceinline__ void copy_async_16(void* destination, const void* source, bool exists) {
#ifdef MEGAMOE_RACECHECK
  // Racecheck does not see that a copy which was waited for is over, where the cluster's other CTA is told so: here it
  // is over at once.
  if (cluster_ctas() > 1) {
    *static_cast<uint4*>(destination) = exists ? __ldcg(static_cast<const uint4*>(source)) : make_uint4(0, 0, 0, 0);
    return;
  }
#endif
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(destination)), "l"(source),
               "r"(exists ? 16 : 0)
               : "memory");
}

// 16 bytes that the L2 keeps longest (`policy`: keep_policy), to an address in shared memory.
__device__ __forceinline__ void copy_async_16_keep(uint32_t destination, const void* source, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "l"(policy)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than the last `kGroups` groups of this thread's copies are on their way.
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace megamoe::ptx
