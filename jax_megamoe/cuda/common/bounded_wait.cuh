// Waits that end. Nothing that a CTA waits for depends on a CTA that has not started (kernels/places.cuh): a launch
// whose CTAs cannot go on has a fault, and ends with an error instead of a hang. Waits for other ranks end otherwise
// (PeerWait, kernels/group.cuh). docs/kernel.md has a table of all of them.
#pragma once

#include <cstdint>

#include "common/ptx/clock.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory_order.cuh"

namespace megamoe {

// Ends the launch with an error. ptxas 13.0 ignores setmaxnreg in a kernel that contains a trap, and spills: the normal
// orientation, which needs the registers, therefore traps in a function that is not inlined. swapAB does not need them,
// and ptxas would serialise its multiplies around such a call.
#ifdef MEGAMOE_OUTLINE_TRAPS
static __device__ __noinline__ void fail() { __trap(); }
#else
__device__ __forceinline__ void fail() { __trap(); }
#endif

// ---- mbarriers
// Bounded by a number of tries instead of a time. The main loops have this inlined many times, a try takes at least
// some 20 ns, and none is counted while the GPU runs another process. In a group the wait may in the end be for other
// ranks, whose time limit PeerWait keeps: a bound above all such limits takes more than 32 bits.
#ifdef MEGAMOE_WAITS_FOR_RANKS
using Tries = uint64_t;
constexpr Tries kMostTries = Tries{1} << 43;
#else
using Tries = uint32_t;
constexpr Tries kMostTries = Tries{1} << 31;
#endif

// `done`: the result of an earlier try.
__device__ __forceinline__ void await(uint64_t* barrier, uint32_t parity, bool done) {
  for (Tries tries = 0; !done; done = ptx::mbarrier_try_wait(barrier, parity)) {
    if (++tries == kMostTries) fail();
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
    if (++tries == kMostTries) fail();
  }
  return true;
}

// ---- counters, and everything else that is polled
// Bounded by a time far above any legitimate wait, that of tools which slow kernels down a hundredfold included. In a
// group it is also above four times the largest limit that a user can set, a day: what is missing may be another
// rank's.
class WaitLimit {
 public:
  __device__ void check() {
    if ((++spins_ & 0xffff) != 0) return;  // reading the timer on every spin would slow the wait itself
    const uint64_t now = ptx::global_nanoseconds();
    if (start_ == 0) start_ = now;
#ifdef MEGAMOE_WAITS_FOR_RANKS
    constexpr uint64_t kSeconds = 1000 * 1000;
#else
    constexpr uint64_t kSeconds = 600;
#endif
    constexpr uint64_t kNanoseconds = kSeconds * 1000 * 1000 * 1000;
    if (now - start_ > kNanoseconds) fail();
  }

 private:
  uint32_t spins_ = 0;
  uint64_t start_ = 0;
};

__device__ __forceinline__ void await_at_least(const uint32_t* counter, uint32_t target) {
  WaitLimit limit;
  while (ptx::load_acquire(counter) < target) limit.check();
}

// ---- flags of other GPUs, for callers who report what is missing
// Waits until the flag is at least `target`, for `limit` nanoseconds at most. Returns whether it came, and what was
// seen last. The timer is read now and then only: it is slower than the flag.
__device__ __forceinline__ bool wait_system(const uint64_t* flag, uint64_t target, uint64_t limit, uint64_t* seen) {
  uint64_t start = 0;
  for (uint32_t spins = 0;; ++spins) {
    *seen = ptx::load_acquire_system(flag);
    if (*seen >= target) return true;
    if ((spins & 0x3ff) != 0x3ff) continue;
    const uint64_t now = ptx::global_nanoseconds();
    if (start == 0) start = now;
    if (now - start > limit) return false;
  }
}

}  // namespace megamoe
