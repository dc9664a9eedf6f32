// What becomes of a counter that a consumer has posted: it advances, and the last one to advance it announces that to
// the other ranks.
#pragma once

#include <cstdint>

#include "common/ptx/memory_order.cuh"
#include "kernels/group.cuh"
#include "kernels/plan.cuh"
#include "kernels/shared_map.cuh"

namespace megamoe {

template <typename Orientation, typename Group>
class CounterAdvance {
 public:
  __device__ CounterAdvance(const MoeArguments& args, const Plan& plan) : args_(args), plan_(plan) {}

  __device__ void operator()(uint32_t* counter) const {
    if constexpr (Group::kHasPeers) {
      const CounterSet& counters = SharedMap<Orientation>::counters(args_);
      if (counter == counters.dispatched_shares()) {
        if (is_last(counter, gridDim.x)) announce_tokens();
        return;
      }
      const int64_t tile = counter - counters.down_done(0);
      if (tile >= 0 && tile < column_tiles()) {
        if (is_last(counter, plan_.num_chunks() * Orientation::kDownSignals)) announce_columns(tile);
        return;
      }
    }
    ptx::add_release(counter, 1);
  }

  // One thread of every CTA: a rank whose experts have no tokens has nobody who would finish last, so that the first
  // one to come announces.
  __device__ void announce_if_idle() const {
    if (plan_.num_chunks() != 0) return;
    if (ptx::fetch_add(SharedMap<Orientation>::counters(args_).idle_ctas(), 1) != 0) return;
    for (int tile = 0; tile < column_tiles(); ++tile) announce_columns(tile);
  }

 private:
  __device__ static bool is_last(uint32_t* counter, uint32_t total) { return ptx::fetch_add(counter, 1) == total - 1; }

  __device__ int column_tiles() const { return args_.constants.down_units.value(); }
  __device__ void announce_tokens() const {
    Group::inject_delay(args_, DelayPoint::kBeforeTokensFlag);
    Group::announce(args_, [](PeerHeader* header) { return header->tokens_sent; }, shared_header().epoch);
  }
  __device__ void announce_columns(int tile) const {
    Group::inject_delay(args_, DelayPoint::kBeforeColumnsFlag);
    Group::announce(args_, [tile](PeerHeader* header) { return header->columns_done[tile]; }, shared_header().epoch);
  }

  const MoeArguments& args_;
  const Plan& plan_;
};

}  // namespace megamoe
