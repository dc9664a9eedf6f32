// The fused expert layer: one persistent CTA per SM, one launch.
//
//   all warps          plan: count the ids, lay out chunks and units
//   consumers (2 WGs)  gather: quantise a share of the tokens into images -> counter `quantized_ctas`
//   weight producer    ticket -> unit -> weights into the ring, from the moment the plan exists
//   signaller          advances the device-wide counters for the consumers
//   token producer     images into the same stages once they exist (gate/up: all gathered; down: `gate_up_done[chunk]`)
//   consumers          multiply, promote; gate/up epilogue -> activation images; down epilogue -> BF16 row per (token, slot)
//                      -> `down_tiles_done[tile]`; then combine
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
__device__ __forceinline__ void consume(const MoeArguments& args, const SharedMap<kSwap>& map,
                                        const CounterSet& counters, Tracer& tracer) {
  StageCursor cursor;
  Signaller signaller(map.header);
  while (true) {
    ptx::mbarrier_wait(&map.header->full[cursor.stage], cursor.parity);
    const UnitNote note = map.header->note[cursor.stage];
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kUnitLanded);
    if (note.end()) {
      if (threadIdx.x == 0) signaller.post(nullptr);
      return;
    }
    if constexpr (kSwap) {
      dispatch_swap_unit<1>(args, map, counters, note, signaller, cursor);
    } else {
      NormalConsumer(args, map, counters, note, signaller).run(cursor);
    }
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kUnitFinished);
  }
}

// Clears the counter set of the next launch; the previous launch, which used it, is over.
__device__ __forceinline__ void clear_counters(const Problem& p, Control* control, uint32_t set) {
  uint32_t* words = CounterSet::at(p, control, set).next_unit;
  for (int i = blockIdx.x * kCtaThreads + threadIdx.x; i < CounterSet::words(p); i += gridDim.x * kCtaThreads) {
    words[i] = 0;
  }
}

template <bool kSwap>
__global__ void __launch_bounds__(kCtaThreads, 1) moe_sm90(const __grid_constant__ MoeArguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const Problem& p = args.problem;
  const int warp = threadIdx.x / 32;
  Tracer tracer(args, TraceRole::kConsumer);
  if (threadIdx.x == 0) tracer.mark(TraceEvent::kStart);

  const uint32_t launch = *reinterpret_cast<volatile uint32_t*>(&args.control->launch);
  const CounterSet counters = CounterSet::at(p, args.control, launch % 2);
  clear_counters(p, args.control, (launch + 1) % 2);
  if (threadIdx.x == 0) init_pipeline(reinterpret_cast<SharedHeader*>(shared));

  const Plan plan = SharedMap<kSwap>::plan(shared, p.num_experts);
  const GatherShare share(p);
  prefetch_share(args, share);
  count_pairs(args, plan, share.first_token() * p.top_k);
  if (warp == 0) lay_out_chunks<kSwap>(plan, p.num_experts);
  __syncthreads();
  const SharedMap<kSwap> map(shared, p.num_experts, *plan.max_rows);

  if (warp >= kConsumerWarps) {
    ptx::decrease_registers<kProducerRegisters>();
    if (threadIdx.x % 32 == 0) {
      if (warp == kWeightProducerWarp) {
        const UnitSchedule<kSwap> schedule(args, plan);
        produce_weights<kSwap>(args, schedule, map, counters);
      } else if (warp == kTokenProducerWarp) {
        produce_tokens<kSwap>(args, map, counters);
      } else if (warp == kSignalWarp) {
        Signaller(map.header).run();
      }
    }
  } else {
    ptx::increase_registers<kConsumerRegisters>();
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kPlanned);
    gather_tokens<kSwap>(args, plan, share, map.pair_targets, counters.quantized_ctas);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kGathered);
    if (blockIdx.x == 0) {
      for (int e = threadIdx.x; e < p.num_experts; e += kConsumerThreads) args.load[e] = plan.count[e];
    }
    consume<kSwap>(args, map, counters, tracer);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kCombineReady);
    combine_tokens<kSwap>(args, plan.num_chunks(p.num_experts), counters);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kCombined);
  }

  __syncthreads();
  if (threadIdx.x == 0) {
    // Wraps to zero with the last CTA, which hands over to the next launch.
    if (atomicInc(&args.control->departed, gridDim.x - 1) == gridDim.x - 1) args.control->launch = launch + 1;
  }
}

}  // namespace megamoe
