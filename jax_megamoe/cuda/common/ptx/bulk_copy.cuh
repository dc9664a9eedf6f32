// Bulk copies by the copy engine, without a tensor map (PTX ISA, "Non-tensor copy instructions: cp.async.bulk").
#pragma once

#include <cstdint>

#include "common/ptx/address.cuh"
#include "common/ptx/l2.cuh"

namespace megamoe::ptx {

// Addresses and size are multiples of 16 bytes; completion is counted in bytes on the barrier.
__device__ __forceinline__ void bulk_copy_global_to_shared(void* destination, const void* source, uint32_t bytes,
                                                           uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_address(destination)),
               "l"(source), "r"(bytes), "r"(smem_address(barrier))
               : "memory");
}

// The same for bytes that nobody reads again soon: they are the first to leave the L2, so that flags, tokens and
// instructions stay in it.
__device__ __forceinline__ void bulk_stream_global_to_shared(void* destination, const void* source, uint32_t bytes,
                                                             uint64_t* barrier) {
  const uint64_t policy = evict_first_policy();
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(smem_address(destination)),
      "l"(source), "r"(bytes), "r"(smem_address(barrier)), "l"(policy)
      : "memory");
}

// The same bytes into the same place of every CTA of the cluster whose rank's bit is set, each told on its own barrier.
__device__ __forceinline__ void bulk_copy_global_to_cluster(void* destination, const void* source, uint32_t bytes,
                                                            uint64_t* barrier, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(smem_address(destination)),
      "l"(source), "r"(bytes), "r"(smem_address(barrier)), "h"(ranks)
      : "memory");
}

// From shared to global memory; counted by groups of a thread's copies.
__device__ __forceinline__ void bulk_copy_shared_to_global(void* destination, const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination),
               "r"(smem_address(source)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_bulk_copies() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all of this thread's have read their source, or written what they copy.
__device__ __forceinline__ void wait_bulk_copies_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void wait_bulk_copies() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Brings bytes into the L2, without a place for them in shared memory yet.
__device__ __forceinline__ void bulk_prefetch(const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// ... of bytes that are read once.
__device__ __forceinline__ void bulk_prefetch_stream(const void* source, uint32_t bytes) {
  const uint64_t policy = evict_first_policy();
  asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(source), "r"(bytes), "l"(policy)
               : "memory");
}

}  // namespace megamoe::ptx
