// The fused expert layer: one persistent CTA per SM, one launch.
//
//   all warps          count the ids
//   a producer warp    plan: lay out chunks and units
//   consumers (2 WGs)  dispatch: quantise a share of the tokens, into images or row by row -> counter `dispatched_shares`
//   weight producer    ticket -> unit -> weights into the ring, from the moment the plan exists
//   signallers         advance the device-wide counters for the consumers
//   token producer     images or rows into the same stages once they exist (gate/up: all dispatched; down: `gate_up_done[chunk]`)
//   consumers          multiply, promote; gate/up epilogue -> activation images; down epilogue -> BF16 row per (token, slot)
//                      -> `down_done[tile]`; then combine
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
#include "kernels/announce.cuh"
#include "kernels/arguments.h"
#include "kernels/combine.cuh"
#include "kernels/dispatch.cuh"
#include "kernels/group.cuh"
#include "kernels/normal_consumer.cuh"
#include "kernels/pipeline.cuh"
#include "kernels/places.cuh"
#include "kernels/plan.cuh"
#include "kernels/swap_consumer.cuh"
#include "kernels/token_producer.cuh"
#include "kernels/trace.cuh"
#include "kernels/weight_producer.cuh"

namespace megamoe {

// One unit: swapAB with the smallest token tile that holds its chunk.
template <typename Orientation, typename Group, int kN = 8>
__device__ __forceinline__ void consume_unit(const MoeArguments& args, const SharedMap<Orientation>& map,
                                             const UnitNote& note, Signaller& signaller, Tracer& tracer,
                                             StageCursor& cursor) {
  if constexpr (!Orientation::kSwapsOperands) {
    NormalConsumer<Group>(args, map, note, signaller, tracer).run(cursor);
  } else {
    if constexpr (kN < kSwapTokenTile) {
      if (note.rows() > kN) return consume_unit<Orientation, Group, kN + 8>(args, map, note, signaller, tracer, cursor);
    }
    SwapConsumer<kN, Group>(args, map, note, signaller, tracer).run(cursor);
  }
}

// Unit after unit, until the weight producer says that there are no more. swapAB returns false, before the first one, where its tokens
// don't come since they are the shares of CTAs that have not started.
template <typename Orientation, typename Group>
__device__ __forceinline__ bool consume(const MoeArguments& args, const SharedMap<Orientation>& map,
                                        Signaller& signaller, Tracer& tracer) {
  StageCursor cursor;
#pragma unroll 1
  while (true) {
    if constexpr (Orientation::kSwapsOperands) {
      await(&map.header().weights_full[cursor.stage], cursor.parity);
      if (!await_unless(&map.header().tokens_full[cursor.stage], cursor.parity, vacant_shares_wanted)) return false;
    } else {
      wait_stage(map.header(), cursor);
    }
    const UnitNote note = map.header().note[cursor.stage];
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kUnitLanded);
    if (note.end()) break;
    consume_unit<Orientation, Group>(args, map, note, signaller, tracer, cursor);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kUnitFinished);
  }
  if (threadIdx.x % kWarpgroupThreads == 0) signaller.post(nullptr);
  return true;
}

// All units; before them, what tokens no other CTA dispatches. swapAB looks for these while it waits for its first unit, which is 1 % of a
// launch of 128 tokens; the normal orientation has no registers left for that.
template <typename Orientation, typename Group>
__device__ __forceinline__ void consume_all(const MoeArguments& args, const Plan& plan,
                                            const SharedMap<Orientation>& map, Signaller& signaller, Tracer& tracer) {
  if constexpr (Orientation::kSwapsOperands) {
#pragma unroll 1
    while (!expected(consume<Orientation, Group>(args, map, signaller, tracer))) {
      dispatch_vacant_shares<Orientation, Group>(args, plan, map, signaller, tracer);
    }
  } else {
    if (!expected(await_unless(&shared_header().tokens_full[0], 0, vacant_shares_wanted))) {
      dispatch_vacant_shares<Orientation, Group>(args, plan, map, signaller, tracer);
    }
    consume<Orientation, Group>(args, map, signaller, tracer);
  }
}

// Clears the counter set of the next launch; the previous launch, which used it, is over. All consumers.
__device__ __forceinline__ void clear_counters(const MoeArguments& args, uint32_t set) {
  uint32_t* words = args.constants.counters[set].next_unit();
  for (int i = blockIdx.x * kConsumerThreads + threadIdx.x; i < args.counter_words; i += gridDim.x * kConsumerThreads) {
    words[i] = 0;
  }
}

// One thread, for one consumer warpgroup or for both.
template <typename Orientation, typename Group, int kQueues>
__device__ __forceinline__ void signal(const MoeArguments& args, const Plan& plan) {
  const CounterAdvance<Orientation, Group> advance(args, plan);
  const int first = threadIdx.x / 32 - kFirstSignalWarp;
  if (first == 0) {
    advance_launch<Group>(args);
    if constexpr (Group::kHasPeers) advance.announce_if_idle();
  }
  serve_signals<kQueues>(shared_header().signals + first, advance);
}

// The producer warps, once the plan is complete.
template <typename Orientation, typename Group>
__device__ __forceinline__ void produce(const MoeArguments& args, const Plan& plan) {
  const int warp = threadIdx.x / 32;
  if constexpr (kMayGatherRows<Orientation, Group>) {
    if (args.constants.gathers_rows && (warp == kTokenProducerWarp || warp == kSecondRowWarp)) {
      const SharedMap<Orientation> map(args, plan);
      return TokenProducer<Orientation, Group, true>(args, map, warp == kSecondRowWarp ? 1 : 0).run();
    }
  }
  if (!ptx::elect_one()) return;
  if (warp == kWeightProducerWarp) {
    const SharedMap<Orientation> map(args, plan);
    WeightProducer<Orientation>(args, map).run(UnitSchedule<Orientation>(args, plan));
  } else if (warp == kTokenProducerWarp) {
    const SharedMap<Orientation> map(args, plan);
    TokenProducer<Orientation, Group, false>(args, map, 0).run();
  } else if (gathers_rows<Orientation, Group>(args)) {
    signal<Orientation, Group, kConsumerWarpgroups>(args, plan);
  } else {
    signal<Orientation, Group, 1>(args, plan);
  }
}

template <typename Orientation, typename Group>
__device__ __forceinline__ void run_moe(const MoeArguments& args) {
  const Problem& p = args.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Group::start_late(args);
  Tracer tracer(args, TraceRole::kConsumer);
  if (threadIdx.x == 0) tracer.mark(TraceEvent::kStart);

  // Loads come first, before the weights fill the memory's queues.
  const DispatchShare share(args, blockIdx.x);
  const typename Group::Opening opening(args);
  ItemPieces<Orientation> first_item;
  if (warp < kConsumerWarps) first_item = load_first_item<Orientation>(args, share);
  RoutesAhead first_routes;
  if (warp == 0) first_routes.load(args, share.first_token() * p.top_k, share.end_token() * p.top_k);
  if constexpr (Orientation::kSwapsOperands && !Group::kHasPeers) {
    if (threadIdx.x == kWeightProducerWarp * 32) prefetch_likely_unit(args);
  }
  OwnPlace place;
  const bool claims = warp == kSecondRowWarp && ptx::elect_one();  // the warp that has the least to do here
  if (claims) place.claim(args.control);
  if (threadIdx.x == kTokenProducerWarp * 32) {
    init_pipeline(shared_header(), Cluster<Orientation>(args).ctas(), gathers_rows<Orientation, Group>(args));
    if constexpr (Group::kHasPeers && !Orientation::kSwapsOperands)
      ptx::fence_cluster();  // `ids_missing`, which the other CTA may set
  }
  __syncwarp();
  Cluster<Orientation>::announce_barriers();
  if (threadIdx.x == kFirstSignalWarp * 32) {
    SharedHeader& header = shared_header();
    header.launch = __ldcg(&args.control->launch);
    if constexpr (Group::kHasPeers) {
      header.epoch = opening.epoch;
      header.ids_bytes = opening.ids_bytes;
      const Peers& peers = args.peers;
      header.timeout_nanoseconds = header.launch == 0 ? peers.first_timeout_nanoseconds : peers.timeout_nanoseconds;
    }
  }
  int first_route = share.first_token() * p.top_k;
  if constexpr (Group::kHasPeers) {
    if (warp == kSecondRowWarp && lane < args.peers.num_ranks) {
      shared_header().workspace[lane] = opening.workspace;
      if (lane == args.peers.rank) shared_header().own_workspace = opening.workspace;
    }
    Group::inject_delay(args, DelayPoint::kBeforeIds);
    Group::send_ids(args, opening);
    if (warp == kWeightProducerWarp) prefetch_certain_weights(args, Group::rank(args));
    first_route += Group::rank(args) * p.num_routes();
  }

  const Plan plan(p.num_local_experts, Group::num_ranks(args), Group::rank(args));
  count_routes<Orientation, Group>(args, plan, first_route, opening.id);
  Cluster<Orientation>::await_barriers();
  if constexpr (Group::kHasPeers) Cluster<Orientation>(args).agree_on_missing_ids(shared_header());
  if (threadIdx.x == 0) tracer.mark(TraceEvent::kCounted);

  if (warp >= kConsumerWarps) {
    ptx::decrease_registers<Orientation::kProducerRegisters>();
    if (warp == kWeightProducerWarp) {
      lay_out_chunks<Orientation>(args, plan, plan.first_expert());
      ptx::mbarrier_arrive(&shared_header().planned);  // every lane, for what it wrote
    } else if (claims) {
      place.settle(args.control);
      ptx::mbarrier_arrive(&shared_header().planned);
    }
    __syncwarp();
    await(&shared_header().planned, 0);
    if constexpr (Group::kHasPeers) {
      if (warp == kTokenProducerWarp) Group::await_tokens(args);
    }
    produce<Orientation, Group>(args, plan);
  } else {
    ptx::increase_registers<Orientation::kConsumerRegisters>();
    if constexpr (Group::kHasPeers) lay_out_other_ranks<Orientation>(args, plan, Group::num_ranks(args));
    await(&shared_header().planned, 0);
    const SharedMap<Orientation> map(args, plan);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kPlanned);
    Group::inject_delay(args, DelayPoint::kBeforeDispatch);
    Signaller signaller(shared_header().signals[threadIdx.x / kWarpgroupThreads]);
    if (expected(shared_header().has_share != 0)) {
      dispatch_share<Orientation, Group>(args, plan, share, first_item, first_routes, map, signaller, tracer);
    }
    end_dispatch<Orientation>(args);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kDispatched);
    clear_counters(args, (map.launch() + 1) % 2);
    if (blockIdx.x == 0) {
      for (int e = threadIdx.x; e < p.num_local_experts; e += kConsumerThreads) {
        args.load[e] = plan.count(plan.first_expert() + e) + (args.adds_to_load ? args.load[e] : 0);
      }
    }
    consume_all<Orientation, Group>(args, plan, map, signaller, tracer);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kCombineReady);
    Group::inject_delay(args, DelayPoint::kBeforeCombine);
    combine_tokens<Orientation, Group>(args, plan.num_chunks());
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kCombined);
    Group::finish(args);
  }
}

template <typename Orientation, typename Group>
__global__ void __launch_bounds__(kCtaThreads, 1) moe_sm90(const __grid_constant__ MoeArguments args) {
  run_moe<Orientation, Group>(args);
}

// Several ranks on one GPU, a row of CTAs each.
template <typename Orientation>
__global__ void __launch_bounds__(kCtaThreads, 1)
    moe_virtual_ranks(const __grid_constant__ VirtualRanksArguments args) {
  run_moe<Orientation, VirtualRanks>(args.of_rank[blockIdx.y]);
}

}  // namespace megamoe
