// Thin wrappers over the SM90 instructions the kernels use: mbarriers, 1-D bulk copies, fences, named barriers, flags.
#pragma once

#include <cstdint>

namespace megamoe::ptx {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value, which all lanes hold, in a uniform register: WGMMA takes its descriptors from there.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __reduce_max_sync(~0u, value); }

// True for one lane of a warp that has converged. Where ptxas knows that a lane is alone, it does not wrap every bulk copy into a
// loop over the lanes that might have other operands.
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

// ---- time, and the end of a launch that cannot go on -----------------------------------------------------------------
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

// Ends the launch with an error. Where a kernel has a trap of its own anywhere, ptxas 13.0 gives no thread more registers than
// all have at first, whatever setmaxnreg says, and spills the others: a kernel that needs them calls for its traps. (swapAB does
// not, and ptxas serialises its multiplies if it does.)
#ifdef MEGAMOE_OUTLINE_TRAPS
static __device__ __noinline__ void fail() { __trap(); }
#else
__device__ __forceinline__ void fail() { __trap(); }
#endif

// ---- mbarrier -----------------------------------------------------------------------------------------------------
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, uint32_t arrivals = 1) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
               : "memory");
}

// Of the barrier's current phase, besides what it expects already; no arrival.
__device__ __forceinline__ void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
               : "memory");
}

// One of the arrivals that the barrier was made for, as soon as all of this thread's asynchronous copies so far have landed. Whoever
// waits for it and multiplies what they brought needs fence_proxy_async_shared in between.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier)) : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(smem_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// The same without ever suspending the thread.
__device__ __forceinline__ bool mbarrier_test_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(smem_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// For what is certain to come soon, such as bytes that have been asked for: bounded by a number of tries, of some 20 ns or more.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  for (uint32_t tries = 0; !mbarrier_try_wait(barrier, parity);) {
    if (++tries == 1u << 31) fail();
  }
}

// ---- thread block clusters ----------------------------------------------------------------------------------------
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

// On the barrier at the same place in the CTA `rank`. Orders what the tensor cores and loads that have returned have read before
// what the copy engine writes thereafter; no fence, which would cost a round through the L2.
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

__device__ __forceinline__ void fence_cluster() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }

// Whole warps. The first orders nothing but what a fence before it does.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// ---- what the L2 is to keep or to drop -----------------------------------------------------------------------------
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

// ---- bulk copy (the copy engine, no tensor map) -------------------------------------------------------------------
// Addresses and size are multiples of 16 bytes; completion is counted in bytes on the barrier.
__device__ __forceinline__ void bulk_copy_global_to_shared(void* destination, const void* source, uint32_t bytes,
                                                           uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_address(destination)),
               "l"(source), "r"(bytes), "r"(smem_address(barrier))
               : "memory");
}

// The same for bytes that nobody reads again soon: they are the first to leave the L2, so that flags, tokens and instructions
// stay in it.
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

// ---- asynchronous copies of a thread's own ------------------------------------------------------------------------
// 16 bytes through the L2; zeros instead where `exists` is false.
__device__ __forceinline__ void copy_async_16(void* destination, const void* source, bool exists) {
#ifdef MEGAMOE_RACECHECK
  // Racecheck does not see that a copy which was waited for is over, where the cluster's other CTA is told so: here it is
  // over at once.
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

// ---- fences -------------------------------------------------------------------------------------------------------
// Orders this thread's ordinary global accesses with the copy engine's (the async proxy), in both directions.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ... and its accesses of the CTA's shared memory.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- named barriers -----------------------------------------------------------------------------------------------
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- device-wide counters -----------------------------------------------------------------------------------------
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

__device__ __forceinline__ void add_release(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// Returns the value before. (Of an `atomicAdd` by a thread that may not be alone the compiler makes one addition for the warp, whose
// answer they wait for at once.)
__device__ __forceinline__ uint32_t fetch_add_relaxed(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// The same. What this thread wrote or observed is visible to whoever adds later.
__device__ __forceinline__ uint32_t fetch_add(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// ---- register reallocation between warpgroups ---------------------------------------------------------------------
template <uint32_t kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <uint32_t kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace megamoe::ptx
