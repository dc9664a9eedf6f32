// The fused expert layer: one persistent CTA per SM, one launch.
//
//   all warps          plan: count the ids, lay out chunks and units
//   consumers (2 WGs)  gather: quantise a share of the tokens into images -> counter `quantized_ctas`
//   weight producer    ticket -> unit -> weights into the ring, from the moment the plan exists
//   signallers         advance the device-wide counters for the consumers
//   token producer     images into the same stages once they exist (gate/up: all gathered; down: `gate_up_done[chunk]`)
//   consumers          multiply, promote; gate/up epilogue -> activation images; down epilogue -> BF16 row per (token, slot)
//                      -> `down_done[tile]`; then combine
//
// Waits form no cycle: a unit only waits for units with lower tickets, which are already being worked on.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/combine.cuh"
#include "kernels/gather.cuh"
#include "kernels/normal_consumer.cuh"
#include "kernels/pipeline.cuh"
#include "kernels/plan.cuh"
#include "kernels/producers.cuh"
#include "kernels/swap_consumer.cuh"
#include "kernels/trace.cuh"

namespace megamoe {

template <bool kSwap>
__device__ __forceinline__ void consume(const MoeArguments& args, const SharedMap<kSwap>& map, Tracer& tracer) {
  StageCursor cursor;
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  Signaller signaller(map.header().signals[warpgroup]);
  while (true) {
    wait_stage(map.header(), cursor);
    const UnitNote note = map.header().note[cursor.stage];
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kUnitLanded);
    if (note.end()) {
      if (threadIdx.x % kWarpgroupThreads == 0) signaller.post(nullptr);
      return;
    }
    if constexpr (kSwap) {
      dispatch_swap_unit<1>(args, map, note, signaller, cursor);
    } else {
      NormalConsumer(args, map, note, signaller).run(cursor);
    }
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kUnitFinished);
  }
}

// Clears the counter set of the next launch; the previous launch, which used it, is over. All consumers.
__device__ __forceinline__ void clear_counters(const Problem& p, Control* control, uint32_t set) {
  uint32_t* words = CounterSet(p, control, set).next_unit();
  for (int i = blockIdx.x * kConsumerThreads + threadIdx.x; i < CounterSet::words(p); i += gridDim.x * kConsumerThreads) {
    words[i] = 0;
  }
}

// One thread of every CTA, once the CTA has read `launch`: the last one sets it for the next launch. `readers` wraps to zero.
__device__ __forceinline__ void pass_turn(Control* control, uint32_t launch) {
  if (atomicInc(&control->readers, gridDim.x - 1) == gridDim.x - 1) control->launch = launch + 1;
}

template <bool kSwap>
__global__ void __launch_bounds__(kCtaThreads, 1) moe_sm90(const __grid_constant__ MoeArguments args) {
  const Problem& p = args.problem;
  const int warp = threadIdx.x / 32;
  Tracer tracer(args, TraceRole::kConsumer);
  if (threadIdx.x == 0) tracer.mark(TraceEvent::kStart);

  // Independent of each other, so that the start waits for memory once.
  const uint32_t launch = *reinterpret_cast<volatile uint32_t*>(&args.control->launch);
  const int first_expert = threadIdx.x < p.num_pairs() ? __ldg(args.topk_ids + threadIdx.x) : -1;
  if (threadIdx.x == 0 && first_expert + static_cast<int>(launch) > -9) tracer.mark(TraceEvent::kLoaded);
  const GatherShare share(p);
  prefetch_share(args, share);
  if (threadIdx.x == 0) {
    init_pipeline(SharedMap<kSwap>::header());
    SharedMap<kSwap>::header().counters = CounterSet(p, args.control, launch % 2);
  }

  const Plan plan(p.num_experts);
  count_pairs(args, plan, share.first_token() * p.top_k, first_expert);
  if (threadIdx.x == 0) tracer.mark(TraceEvent::kCounted);
  if (warp == 0) lay_out_chunks<kSwap>(plan);
  __syncthreads();
  const SharedMap<kSwap> map(p.num_experts, plan.max_rows());

  if (warp >= kConsumerWarps) {
    ptx::decrease_registers<kProducerRegisters>();
    if (threadIdx.x % 32 == 0) {
      if (warp == kWeightProducerWarp) {
        WeightProducer<kSwap>(args, map).run(UnitSchedule<kSwap>(args, plan), SharedMap<kSwap>::counters().next_unit());
      } else if (warp == kTokenProducerWarp) {
        produce_tokens<kSwap>(args, map);
      } else {
        if (warp == kFirstSignalWarp) pass_turn(args.control, launch);
        Signaller(map.header().signals[warp - kFirstSignalWarp]).run();
      }
    }
  } else {
    ptx::increase_registers<kConsumerRegisters>();
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kPlanned);
    gather_tokens<kSwap>(args, plan, share, map.pair_targets(), SharedMap<kSwap>::counters().quantized_ctas(), tracer);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kGathered);
    clear_counters(p, args.control, (launch + 1) % 2);
    if (blockIdx.x == 0) {
      for (int e = threadIdx.x; e < p.num_experts; e += kConsumerThreads) args.load[e] = plan.count(e);
    }
    consume<kSwap>(args, map, tracer);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kCombineReady);
    combine_tokens<kSwap>(args, plan.num_chunks());
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kCombined);
  }
}

}  // namespace megamoe
