// What the four warps of the producer warpgroup do.
#pragma once

#include <cstdint>

#include "common/ptx/warp.cuh"
#include "kernels/announce.cuh"
#include "kernels/image_assembly.cuh"
#include "kernels/places.cuh"
#include "kernels/plan.cuh"
#include "kernels/row_gather.cuh"
#include "kernels/schedule.cuh"
#include "kernels/shared_map.cuh"
#include "kernels/signals.cuh"
#include "kernels/token_producer.cuh"
#include "kernels/weight_producer.cuh"

namespace megamoe {

// A signaller: advances counters for one consumer warpgroup, or for both. One thread.
template <typename Orientation, typename Group, int kQueues>
__device__ __forceinline__ void signal(const MoeArguments& args, const Plan& plan) {
  const CounterAdvance<Orientation, Group> advance(args, plan);
  const int first = threadIdx.x / 32 - kFirstSignalWarp;
  if (first == 0) {
    advance_launch<Group>(args);
    if constexpr (Group::kHasPeers) {
      PeerWait::has_failed(args.peers);  // in an earlier launch, where all ids have come
      advance.announce_if_idle();
    }
  }
  serve_signals<kQueues>(shared_header().signals + first, advance);
}

// Who does what in the producer warpgroup, once the plan is complete: one elected lane of each warp, but for the two
// warps that gather rows, or the one that assembles images.
template <typename Orientation, typename Group>
__device__ __forceinline__ void produce(const MoeArguments& args, const Plan& plan) {
  const int warp = threadIdx.x / 32;
  if constexpr (kMayGatherRows<Orientation, Group>) {
    if (args.constants.gathers_rows && (warp == kTokenProducerWarp || warp == kSecondRowWarp)) {
      // The first has waited for tokens, or in vain; what they take is free, and all shares are dispatched.
      if constexpr (Group::kHasPeers) ptx::named_barrier_sync(kRowWarpsBarrier, kRowWarps * 32);
      const SharedMap<Orientation> map(args, plan);
      return TokenProducer<Orientation, Group, true>(args, map, warp == kSecondRowWarp ? 1 : 0).run();
    }
  }
  if constexpr (kMayAssembleImages<Orientation, Group>) {
    if (warp == kAssemblyWarp && args.constants.assembles_images) {
      const SharedMap<Orientation> map(args, plan);
      return ImageAssembler<Orientation, Group>(args, map, plan).run();
    }
  }
  if (!ptx::elect_one()) return;
  if (warp == kWeightProducerWarp) {
    const SharedMap<Orientation> map(args, plan);
    if constexpr (Group::kHasPeers && !Orientation::kSwapsOperands) {
      // A plan of its own: the thread has no registers to spare, and these numbers are in constant memory.
      const Plan own(args.problem.num_local_experts, Group::num_ranks(args), Group::rank(args));
      WeightProducer<Orientation>(args, map).run(UnitSchedule<Orientation>(args, own));
    } else {
      WeightProducer<Orientation>(args, map).run(UnitSchedule<Orientation>(args, plan));
    }
  } else if (warp == kTokenProducerWarp) {
    const SharedMap<Orientation> map(args, plan);
    TokenProducer<Orientation, Group, false>(args, map, 0).run();
  } else if (gathers_rows<Orientation, Group>(args) || assembles_images<Orientation, Group>(args)) {
    signal<Orientation, Group, kConsumerWarpgroups>(args, plan);
  } else {
    signal<Orientation, Group, 1>(args, plan);
  }
}

}  // namespace megamoe
