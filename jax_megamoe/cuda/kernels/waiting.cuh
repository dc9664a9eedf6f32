// Bounded waiting inside a launch. Nothing that a CTA waits for depends on a CTA that has not started (kernels/places.cuh), so that a
// launch whose CTAs cannot go on has a fault: it ends with an error instead of a hang. Waits for other ranks end otherwise (group.cuh).
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace megamoe {

// `condition`, which nearly always holds. What is done where it does not had better not lie between what is done where it does: a launch
// finds little of its code in the SM's cache.
__device__ __forceinline__ bool expected(bool condition) { return __builtin_expect(condition, true); }

// After `done`, what an earlier question said. Bounded by a number of tries instead of a time: the main loops have this inlined many
// times, a try takes at least some 20 ns, and none is counted while the GPU runs somebody else. In a group it may be other ranks that
// are waited for, in the end; how long, others decide (PeerWait): a bound for all their limits takes more than 32 bits.
#ifdef MEGAMOE_WAITS_FOR_RANKS
using Tries = uint64_t;
constexpr Tries kMostTries = Tries{1} << 43;
#else
using Tries = uint32_t;
constexpr Tries kMostTries = Tries{1} << 31;
#endif

__device__ __forceinline__ void await(uint64_t* barrier, uint32_t parity, bool done) {
  for (Tries tries = 0; !done; done = ptx::mbarrier_try_wait(barrier, parity)) {
    if (++tries == kMostTries) ptx::fail();
  }
}

__device__ __forceinline__ void await(uint64_t* barrier, uint32_t parity) {
  await(barrier, parity, ptx::mbarrier_try_wait(barrier, parity));
}

// Returns false, without having waited for long, once `stops()` holds.
template <typename Stops>
__device__ __forceinline__ bool await_unless(uint64_t* barrier, uint32_t parity, const Stops& stops) {
  for (Tries tries = 0; !ptx::mbarrier_try_wait(barrier, parity);) {
    if (stops()) return false;
    if (++tries == kMostTries) ptx::fail();
  }
  return true;
}

// For waits that look at something else again and again: far above any legitimate wait, tools that slow kernels down a hundredfold
// included.
class WaitLimit {
 public:
  __device__ void check() {
    if ((++spins_ & 0xffff) != 0) return;  // reading the timer on every spin would slow the wait itself
    const uint64_t now = ptx::global_nanoseconds();
    if (start_ == 0) start_ = now;
    constexpr uint64_t kNanoseconds = 600ull * 1000 * 1000 * 1000;
    if (now - start_ > kNanoseconds) ptx::fail();
  }

 private:
  uint32_t spins_ = 0;
  uint64_t start_ = 0;
};

__device__ __forceinline__ void await_at_least(const uint32_t* counter, uint32_t target) {
  WaitLimit limit;
  while (ptx::load_acquire(counter) < target) limit.check();
}

}  // namespace megamoe
