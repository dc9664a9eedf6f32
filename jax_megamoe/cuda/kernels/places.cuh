// A CTA's place in the launch is work that is its own without drawing a ticket: a share of the tokens, and the first
// unit. Another kernel may hold the SM that a CTA is to run on for as long as it likes, and may itself wait for this
// launch. So a CTA that has waited for a while takes over the places of those that have not started. A CTA that starts
// late finds its place taken.
//
// Each place has a count of the launches in which somebody has claimed it. It is never cleared: `launch` claims are
// those of earlier launches, one more is this one's.
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/expected.cuh"
#include "common/ptx/clock.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory_order.cuh"
#include "kernels/arguments.h"
#include "kernels/shared_header.cuh"

namespace megamoe {

// How long to wait before taking places over: some 20 us, far longer than it takes the CTAs of a launch to start where
// SMs are free.
constexpr int64_t kTakeOverCycles = 40000;

// The CTA's claim of its own place; one thread. It is made at the very start, and looked at when the number of the
// launch is known.
class OwnPlace {
 public:
  __device__ void claim(Control* control) {
    shares_before_ = ptx::fetch_add_relaxed(control->share_claims + blockIdx.x, 1);
    units_before_ = ptx::fetch_add_relaxed(control->unit_claims + blockIdx.x, 1);  // of a cluster, the first counts
  }

  // Decides whether the CTA keeps its share and its first unit. A claim that came too late is taken back.
  __device__ void settle(Control* control) const {
    SharedHeader& header = shared_header();
    header.has_share = stands(shares_before_, control->share_claims + blockIdx.x);
    header.has_unit = stands(units_before_, control->unit_claims + blockIdx.x);
  }

 private:
  __device__ static bool stands(uint32_t before, uint32_t* claims) {
    if (expected(before == shared_header().launch)) return true;
    atomicSub(claims, 1);
    return false;
  }

  uint32_t shares_before_ = 0, units_before_ = 0;
};

// One thread: whether the place was nobody's in this launch, and is the caller's now.
__device__ __forceinline__ bool take_over(uint32_t* claims) {
  const uint32_t launch = shared_header().launch;
  return ptx::load_relaxed(claims) == launch && atomicCAS(claims, launch, launch + 1) == launch;
}

// One thread of every CTA, once the CTA has read `launch` and the epoch: the last one sets them for the next launch.
// `readers` wraps to zero.
template <typename Group>
__device__ __forceinline__ void advance_launch(const MoeArguments& args) {
  if (atomicInc(&args.control->readers, gridDim.x - 1) != gridDim.x - 1) return;
  args.control->launch = shared_header().launch + 1;
  if constexpr (Group::kHasPeers) args.peers.view->epoch = shared_header().epoch;
}

// Whether all CTAs have started, which is when the launch's number goes on.
__device__ __forceinline__ bool all_started(uint32_t launch_now) { return launch_now != shared_header().launch; }
__device__ __forceinline__ uint32_t launch_now(const MoeArguments& args) {
  return ptx::load_relaxed(&args.control->launch);
}

// Where tokens don't come, the shares of CTAs that have not started may be what is missing. The token producer requests
// that the consumers, who wait for its tokens, take them over, and goes on waiting when they have.
class VacantShareWatch {
 public:
  __device__ explicit VacantShareWatch(const MoeArguments& args) : args_(args), begin_(ptx::cycles()) {}

  // One thread, which waits for tokens, again and again.
  __device__ __forceinline__ void check() {
    if (has_ended_ || ptx::cycles() - begin_ < kTakeOverCycles) return;
    has_ended_ = true;
    if (all_started(launch_now(args_))) return;
    has_requested_ = true;
    SharedHeader& header = shared_header();
    ptx::mbarrier_arrive(&header.vacant_shares_wanted);
    await(&header.vacant_shares_done, 0);
  }

  __device__ __forceinline__ bool has_requested() const { return has_requested_; }

 private:
  const MoeArguments& args_;
  int64_t begin_;
  bool has_ended_ = false, has_requested_ = false;
};

// For consumers that wait for the first tokens. They dispatch what is wanted once.
__device__ __forceinline__ bool vacant_shares_wanted() {
  SharedHeader& header = shared_header();
  return ptx::mbarrier_test_wait(&header.vacant_shares_wanted, 0) &&
         !ptx::mbarrier_test_wait(&header.vacant_shares_done, 0);
}

}  // namespace megamoe
