// The wide orientation's clusters: for each gate/up unit, both CTAs tell each other the maximum of each token over their
// columns.
//
// Maxima of one unit after the other go to two places in turn. Neither CTA is a unit further than the other one's
// maxima allow: who sends those of unit n + 2 has those of n + 1 of the other, which by then has read unit n's.
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/mbarrier.cuh"
#include "kernels/shared_map.cuh"

namespace megamoe {

template <typename Wide>
class MaximaExchange {
 public:
  // One thread, before the cluster's CTAs know of each other's barriers.
  __device__ static void init(SharedHeader& header) {
    for (uint64_t& landed : state(header).landed) ptx::mbarrier_init(&landed, 1);
    state(header).units = 0;
  }

  // At the start of a unit's epilogue, before a barrier of all consumers.
  __device__ __forceinline__ explicit MaximaExchange(const SharedMap<Wide>& map)
      : map_(map), unit_(state(map.header()).units) {}

  // One thread for each of `tokens`: the larger one of the maximum here and that of the other CTA.
  __device__ __forceinline__ float larger(float amax, int token, int tokens) const {
    uint64_t* landed = &state(map_.header()).landed[unit_ % 2];
    float* others = map_.wide_partner_amax(unit_ % 2);
    ptx::store_in_cluster(reinterpret_cast<uint32_t*>(others + token), __float_as_uint(amax), landed,
                          ptx::cluster_rank() ^ 1);
    if (token == 0) ptx::mbarrier_arrive_expect_tx(landed, tokens * static_cast<int>(sizeof(float)));
    await(landed, unit_ / 2 % 2);
    return fmaxf(amax, others[token]);
  }

  // One thread, between two barriers of all consumers, once all have their maxima.
  __device__ __forceinline__ void end() const { state(map_.header()).units = unit_ + 1; }

 private:
  // Where other formats have the scales of blocks.
  struct State {
    uint64_t landed[2];
    uint32_t units;  // that have been exchanged
  };
  __device__ static State& state(SharedHeader& header) {
    static_assert(Wide::Format::kRowScales && sizeof(State) <= sizeof(header.weight_scale));
    return *reinterpret_cast<State*>(header.weight_scale);
  }

  const SharedMap<Wide>& map_;
  uint32_t unit_;
};

}  // namespace megamoe
