// The fused expert layer: one persistent CTA per SM, or two, one launch.
//
//   all warps          begin: load what comes from memory, send ids to other ranks; then count the ids
//   a producer warp    make the plan: lay out chunks and units
//   consumers (2 WGs)  dispatch: quantise a share of the tokens, into images or row by row -> `dispatched_shares`
//                      (a lone token: each CTA all of it, for itself)
//   weight producer    ticket -> unit -> weights into the ring, from the moment the plan exists
//   signallers         advance the device-wide counters for the consumers
//   token producer     images or rows into the same stages once they exist (gate/up: `dispatched_shares` of all CTAs;
//                      down: `units_done[chunk]`)
//   decoders           weights that are to be decoded, from their own ring into the consumers' (many tokens of MXFP4)
//   consumers          multiply, promote; gate/up epilogue -> activation images -> `units_done[chunk]`;
//                      down epilogue -> BF16 row per (token, slot) -> `down_done[tile]`; then combine
//
// Waits form no cycle: a unit only waits for units with lower tickets, which are already being worked on. With many
// tokens for each expert CTAs work in clusters of two, which share tickets and weights (cluster.cuh).
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/expected.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/registers.cuh"
#include "common/ptx/warp.cuh"
#include "kernels/arguments.h"
#include "kernels/begin.cuh"
#include "kernels/cluster.cuh"
#include "kernels/combine.cuh"
#include "kernels/consume.cuh"
#include "kernels/dispatch.cuh"
#include "kernels/group.cuh"
#include "kernels/lone_token.cuh"
#include "kernels/places.cuh"
#include "kernels/plan.cuh"
#include "kernels/prefetch.cuh"
#include "kernels/produce.cuh"
#include "kernels/ring.cuh"
#include "kernels/shared_map.cuh"
#include "kernels/signals.cuh"
#include "kernels/trace.cuh"
#include "kernels/weight_decoder.cuh"

namespace megamoe {

// One warp completes the plan.
template <typename Orientation>
__device__ __forceinline__ void make_plan(const MoeArguments& args, const Plan& plan) {
  lay_out_chunks<Orientation>(args, plan, plan.first_expert());
  ptx::mbarrier_arrive(&shared_header().planned);  // every lane, for what it wrote
}

// ... and the thread that has claimed the CTA's place looks whether it has it.
__device__ __forceinline__ void settle_place(const MoeArguments& args, const OwnPlace& place) {
  place.settle(args.control);
  ptx::mbarrier_arrive(&shared_header().planned);
}

// The consumers' wait for the plan. In a group they work out where the rows of other ranks' experts lie meanwhile.
template <typename Orientation, typename Group>
__device__ __forceinline__ void await_plan(const MoeArguments& args, const Plan& plan) {
  if constexpr (Group::kHasPeers) lay_out_other_ranks<Orientation>(args, plan, Group::num_ranks(args));
  await(&shared_header().planned, 0);
}

// Clears the counter set of the next launch; the previous launch, which used it, is over. All consumers.
__device__ __forceinline__ void clear_counters(const MoeArguments& args, uint32_t set) {
  uint32_t* words = args.constants.counters[set].next_unit();
  for (int i = blockIdx.x * kConsumerThreads + threadIdx.x; i < args.counter_words; i += gridDim.x * kConsumerThreads) {
    words[i] = 0;
  }
}

// The expert load, which is known with the plan. All consumers of one CTA.
__device__ __forceinline__ void store_load(const MoeArguments& args, const Plan& plan) {
  for (int e = threadIdx.x; e < args.problem.num_local_experts; e += kConsumerThreads) {
    args.load[e] = plan.count(plan.first_expert() + e) + (args.adds_to_load ? args.load[e] : 0);
  }
}

// One launch, in the phases of the comment at the top. `claims` must stay a variable of this function: if it passes
// through an argument or a member, ptxas no longer sees that one lane is alone, and makes votes of its atomics.
template <typename Orientation, typename Group>
__device__ __forceinline__ void run_moe(const MoeArguments& args) {
  const Problem& p = args.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Group::start_late(args);
  Tracer tracer(args, TraceRole::kConsumer);
  tracer.mark_by_first(TraceEvent::kStart);

  // Begin. Loads come first, before the weights fill the memory's queues.
  const DispatchShare share(args, has_lone_token<Orientation, Group>(args) ? 0 : blockIdx.x);
  const typename Group::Opening opening(args);
  ItemPieces<Orientation> first_item;
  if (warp < kConsumerWarps) first_item = load_first_item<Orientation>(args, share);
  LoneToken<Orientation, Group> lone_token;
  if (warp < kConsumerWarps) lone_token.load(args);
  RoutesAhead first_routes;
  if (warp == 0) first_routes.load(args, share.first_token() * p.top_k, share.end_token() * p.top_k);
  if constexpr (Orientation::kSwapsOperands && !Group::kHasPeers) {
    if (threadIdx.x == kWeightProducerWarp * 32) prefetch_likely_unit<Orientation>(args);
  }
  OwnPlace place;
  const bool claims = warp == Orientation::kClaimWarp && ptx::elect_one();
  if (claims) place.claim(args.control);

  // Barriers in shared memory, and in a group the own ids to all ranks.
  if (threadIdx.x == kTokenProducerWarp * 32) {
    init_pipeline<Orientation>(shared_header(), Cluster<Orientation>(args).ctas(),
                               gathers_rows<Orientation, Group>(args));
    // `ids_missing`, which the cluster's other CTA may set.
    if constexpr (Group::kHasPeers && !Orientation::kSwapsOperands) ptx::fence_cluster();
  }
  __syncwarp();
  Cluster<Orientation>::announce_barriers();
  if (threadIdx.x == kFirstSignalWarp * 32) note_launch<Group>(args, opening);
  int first_route = share.first_token() * p.top_k;
  join_group<Orientation, Group>(args, opening, warp, lane);
  first_route = Group::route_in_group(args, first_route);

  // Make the plan: routes per expert, by all warps.
  const Plan plan(p.num_local_experts, Group::num_ranks(args), Group::rank(args));
  count_routes<Orientation, Group>(args, plan, first_route, opening.id);
  Cluster<Orientation>::await_barriers();
  if constexpr (Group::kHasPeers) Cluster<Orientation>(args).agree_on_missing_ids(shared_header());
  tracer.mark_by_first(TraceEvent::kCounted);

  // Produce and consume. Two warps complete the plan. Where there are decoders, producers have so few registers that
  // others do what does not have to be theirs.
  if (warp >= kFirstDecoderWarp) {
    if constexpr (Orientation::kHasDecoders) {
      ptx::decrease_registers<Orientation::kDecoderRegisters>();
      if (claims) settle_place(args, place);
      __syncwarp();
      await(&shared_header().planned, 0);
      const SharedMap<Orientation> map(args, plan);
      WeightDecoder<Orientation>(args, map).run();
    }
  } else if (warp >= kConsumerWarps) {
    ptx::decrease_registers<Orientation::kProducerRegisters>();
    if constexpr (!Orientation::kHasDecoders) {
      if (warp == kWeightProducerWarp) {
        make_plan<Orientation>(args, plan);
      } else if (claims) {
        settle_place(args, place);
      }
      __syncwarp();
    }
    await(&shared_header().planned, 0);
    if constexpr (Group::kHasPeers) {
      if constexpr (Orientation::kHasDecoders) {
        constexpr int kWatchingWarp = kFirstSignalWarp + 1;
        if (warp == kTokenProducerWarp || warp == kWatchingWarp) {
          Group::await_watched_tokens(args, warp == kWatchingWarp);
        }
      } else if (warp == kTokenProducerWarp) {
        Group::await_tokens(args);
      }
    }
    produce<Orientation, Group>(args, plan);
  } else {
    ptx::increase_registers<Orientation::kConsumerRegisters>();
    if (Orientation::kHasDecoders && warp == 0) make_plan<Orientation>(args, plan);
    lone_token.quantize(args, first_item);
    await_plan<Orientation, Group>(args, plan);
    const SharedMap<Orientation> map(args, plan);
    tracer.mark_by_first(TraceEvent::kPlanned);

    Group::inject_delay(args, DelayPoint::kBeforeDispatch);
    Signaller<Orientation> signaller(shared_header().signals[threadIdx.x / kWarpgroupThreads]);
    bool dispatches = expected(shared_header().has_share != 0);
    if constexpr (kMayHaveLoneToken<Orientation, Group>) {
      if (args.constants.has_lone_token) {
        dispatch_lone_token<Orientation, Group>(args, plan, share, first_routes, map);
        dispatches = false;
      }
    }
    if (dispatches) {
      dispatch_share<Orientation, Group>(args, plan, share, first_item, first_routes, map, signaller, tracer);
    }
    end_dispatch<Orientation>(args);
    tracer.mark_by_first(TraceEvent::kDispatched);

    clear_counters(args, (map.launch() + 1) % 2);
    if (blockIdx.x == 0) store_load(args, plan);
    consume_all<Orientation, Group>(args, plan, map, signaller, tracer);
    tracer.mark_by_first(TraceEvent::kCombineReady);

    Group::inject_delay(args, DelayPoint::kBeforeCombine);
    combine_tokens<Orientation, Group>(args, plan.num_chunks());
    tracer.mark_by_first(TraceEvent::kCombined);
    Group::finish(args);
  }
}

template <typename Orientation, typename Group>
__global__ void __launch_bounds__(Orientation::kThreads, Orientation::kCtasPerSm)
    moe_sm90(const __grid_constant__ MoeArguments args) {
  run_moe<Orientation, Group>(args);
}

// Several ranks on one GPU, a row of CTAs each.
template <typename Orientation>
__global__ void __launch_bounds__(Orientation::kThreads, Orientation::kCtasPerSm)
    moe_virtual_ranks(const __grid_constant__ VirtualRanksArguments args) {
  run_moe<Orientation, VirtualRanks>(args.of_rank[blockIdx.y]);
}

}  // namespace megamoe
