// The fused expert layer: one persistent CTA per SM, one launch.
//
//   all warps          count the ids
//   a producer warp    plan: lay out chunks and units
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

// Unit after unit, until the weight producer says that there are no more.
template <typename Consumer, bool kSwap>
__device__ __forceinline__ void consume(const MoeArguments& args, const SharedMap<kSwap>& map, Tracer& tracer) {
  StageCursor cursor;
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  Signaller signaller(map.header().signals[warpgroup]);
#pragma unroll 1
  while (true) {
    wait_stage(map.header(), cursor);
    const UnitNote note = map.header().note[cursor.stage];
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kUnitLanded);
    if (note.end()) break;
    Consumer(args, map, note, signaller, tracer).run(cursor);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kUnitFinished);
  }
  if (threadIdx.x % kWarpgroupThreads == 0) signaller.post(nullptr);
}

// With the smallest token tile that holds the launch's largest chunk.
template <int kN = 8>
__device__ __forceinline__ void consume_swapped(const MoeArguments& args, const SharedMap<true>& map, Tracer& tracer) {
  if constexpr (kN < kSwapTokenTile) {
    if (map.max_rows > kN) return consume_swapped<kN + 8>(args, map, tracer);
  }
  consume<SwapConsumer<kN>>(args, map, tracer);
}

// Clears the counter set of the next launch; the previous launch, which used it, is over. All consumers.
__device__ __forceinline__ void clear_counters(const LaunchConstants& constants, uint32_t set) {
  uint32_t* words = constants.counters[set].next_unit();
  for (int i = blockIdx.x * kConsumerThreads + threadIdx.x; i < constants.counter_words;
       i += gridDim.x * kConsumerThreads) {
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

  // What comes from memory is asked for first, before the weights flood its queues.
  const int first_expert = threadIdx.x < p.num_pairs() ? __ldg(args.topk_ids + threadIdx.x) : -1;
  const GatherShare share(args);
  uint4 first_item = make_uint4(0, 0, 0, 0);
  if (warp < kConsumerWarps) first_item = load_item(args, share, share.first_item + warp);
  if (threadIdx.x == kTokenProducerWarp * 32) init_pipeline(SharedMap<kSwap>::header());
  if (threadIdx.x == kFirstSignalWarp * 32) SharedMap<kSwap>::header().launch = __ldcg(&args.control->launch);

  const Plan plan(p.num_experts);
  count_pairs<kSwap>(args, plan, share.first_token() * p.top_k, first_expert);
  if (threadIdx.x == 0) tracer.mark(TraceEvent::kCounted);

  if (warp >= kConsumerWarps) {
    ptx::decrease_registers<Orientation<kSwap>::kProducerRegisters>();
    if (warp == kWeightProducerWarp) {
      lay_out_chunks<kSwap>(plan);
      ptx::mbarrier_arrive(&SharedMap<kSwap>::header().planned);  // every lane, for what it wrote
      __syncwarp();
    }
    if (threadIdx.x % 32 == 0) {
      if (warp == kWeightProducerWarp) {
        const SharedMap<kSwap> map(args, plan.max_rows());
        WeightProducer<kSwap>(args, map).run(UnitSchedule<kSwap>(args, plan));
      } else if (warp == kTokenProducerWarp) {
        ptx::mbarrier_wait(&SharedMap<kSwap>::header().planned, 0);
        produce_tokens<kSwap>(args, SharedMap<kSwap>(args, plan.max_rows()));
      } else {
        if (warp == kFirstSignalWarp) pass_turn(args.control, SharedMap<kSwap>::launch());
        Signaller(SharedMap<kSwap>::header().signals[warp - kFirstSignalWarp]).run();
      }
    }
  } else {
    ptx::increase_registers<Orientation<kSwap>::kConsumerRegisters>();
    ptx::mbarrier_wait(&SharedMap<kSwap>::header().planned, 0);
    const SharedMap<kSwap> map(args, plan.max_rows());
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kPlanned);
    gather_tokens<kSwap>(args, plan, share, first_item, map.pair_targets(), tracer);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kGathered);
    clear_counters(args.constants, (map.launch() + 1) % 2);
    if (blockIdx.x == 0) {
      for (int e = threadIdx.x; e < p.num_experts; e += kConsumerThreads) args.load[e] = plan.count(e);
    }
    if constexpr (kSwap) {
      consume_swapped(args, map, tracer);
    } else {
      consume<NormalConsumer>(args, map, tracer);
    }
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kCombineReady);
    combine_tokens<kSwap>(args, plan.num_chunks());
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kCombined);
  }
}

}  // namespace megamoe
