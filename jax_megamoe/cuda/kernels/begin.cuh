// The begin of a launch, before anything of the plan is known.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/group.cuh"
#include "kernels/prefetch.cuh"
#include "kernels/roles.h"
#include "kernels/shared_header.cuh"

namespace megamoe {

// The header's numbers of this launch. One thread.
template <typename Group>
__device__ __forceinline__ void note_launch(const MoeArguments& args, const typename Group::Opening& opening) {
  SharedHeader& header = shared_header();
  header.launch = __ldcg(&args.control->launch);
  if constexpr (Group::kHasPeers) {
    header.epoch = opening.epoch;
    header.ids_bytes = opening.ids_bytes;
    const Peers& peers = args.peers;
    header.timeout_nanoseconds = header.launch == 0 ? peers.first_timeout_nanoseconds : peers.timeout_nanoseconds;
  }
}

// In a group: where other ranks' memory is, the own ids to all ranks, and meanwhile weights that are certain to be
// read.
template <typename Orientation, typename Group>
__device__ __forceinline__ void join_group(const MoeArguments& args, const typename Group::Opening& opening, int warp,
                                           int lane) {
  if constexpr (Group::kHasPeers) {
    if (warp == kSecondRowWarp && lane < args.peers.num_ranks) {
      shared_header().workspace[lane] = opening.workspace;
      if (lane == args.peers.rank) {
        shared_header().own_workspace = opening.workspace;
        shared_header().group_failed = 0;
      }
    }
    Group::inject_delay(args, DelayPoint::kBeforeIds);
    if (warp < kFirstDecoderWarp) Group::send_ids(args, opening);  // the others send all ids
    if (warp == kWeightProducerWarp) prefetch_certain_weights<Orientation>(args, Group::rank(args));
  }
}

}  // namespace megamoe
