// Thread block clusters: the other CTA's shared memory, and barriers with it (PTX ISA, "Cluster", "mapa", "st.async",
// "barrier.cluster").
#pragma once

#include <cstdint>

#include "common/ptx/address.cuh"

namespace megamoe::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_ctas() {
  uint32_t ctas;
  asm("mov.u32 %0, %cluster_nctaid.x;" : "=r"(ctas));
  return ctas;
}

// Where `pointer`, which is this CTA's, lies in another CTA of the cluster.
__device__ __forceinline__ uint32_t cluster_address(const void* pointer, uint32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address(pointer)), "r"(rank));
  return address;
}

// On the barrier at the same place in the CTA `rank`. Orders what the tensor cores and loads that have returned have
// read before what the copy engine writes thereafter; no fence, which would cost a round through the L2.
__device__ __forceinline__ void mbarrier_arrive_in_cluster(uint64_t* barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank)) : "memory");
}

// Stores a word in the CTA `rank` and counts its four bytes on a barrier there.
__device__ __forceinline__ void store_in_cluster(uint32_t* word, uint32_t value, uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(cluster_address(word, rank)),
      "r"(value), "r"(cluster_address(barrier, rank))
      : "memory");
}

__device__ __forceinline__ void store_in_cluster(uint32_t* word, uint32_t value, uint32_t rank) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(cluster_address(word, rank)), "r"(value) : "memory");
}

// Bytes of this CTA's shared memory to the same place in the CTA `rank`, which has to be another one, counted on the
// barrier at the same place there.
__device__ __forceinline__ void bulk_copy_in_cluster(const void* source, uint32_t bytes, uint64_t* barrier,
                                                     uint32_t rank) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   cluster_address(source, rank)),
               "r"(smem_address(source)), "r"(bytes), "r"(cluster_address(barrier, rank))
               : "memory");
}

__device__ __forceinline__ void fence_cluster() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }

// Whole warps. The first orders nothing but what a fence before it does.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

}  // namespace megamoe::ptx
