// The shared-memory ring between the producers and the consumers, and the map of a CTA's shared memory.
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/mbarrier.cuh"
#include "kernels/cluster.cuh"
#include "kernels/plan.cuh"
#include "kernels/roles.h"
#include "kernels/route_target.cuh"
#include "layout/image.h"

namespace megamoe {

constexpr int kDownTileRowBytes = kDownTileColumns * 2;  // bf16
static_assert(kDownTileRowBytes == kBlockK, "swizzled_offset is for rows of this length");

constexpr int kSharedBytes = 232448;  // spec: 227 KiB of dynamic shared memory per CTA on SM90

// Map of a CTA's shared memory: header, plan, epilogue scratch, then as many stages as fit. The token part of a stage is
// sized by the largest chunk of this launch, which every CTA knows from its plan.
template <typename Orientation>
class SharedMap {
 public:
  int max_rows;
  int num_stages;

  // For a plan that is complete.
  __device__ SharedMap(const MoeArguments& args, const Plan& plan) {
    // The normal path reads 64 or 128 rows, the padding ones included.
    max_rows = Orientation::kSwapsOperands ? plan.max_rows() : round_up(plan.max_rows(), kWarpgroupTokens);
    scratch_offset_ = plan.end();
    ring_offset_ = ring_begin(plan, max_rows);
    num_stages = args.constants.stages[max_rows / 8 - 1];
  }

  // How many stages fit; computed on the host.
  __host__ __device__ static int stages_that_fit(const Plan& plan, int rows) {
    const int fit = (kSharedBytes - ring_begin(plan, rows)) / stage_bytes(rows);
    return fit < kMaxStages ? fit : kMaxStages;
  }

  __device__ static SharedHeader& header() { return shared_header(); }

  __device__ static uint32_t launch() { return header().launch; }
  __device__ static const CounterSet& counters(const MoeArguments& args) {
    return args.constants.counters[launch() % 2];
  }

  // [kRouteBatch], shares the epilogue scratch: tokens are dispatched before the first epilogue.
  __device__ RouteTarget* route_targets() const { return reinterpret_cast<RouteTarget*>(scratch()); }
  // swapAB: [8 warps][max_rows]; normal: [warpgroups][64]
  __device__ float* row_amax() const { return reinterpret_cast<float*>(scratch()); }
  // normal: [128], behind the maxima: where the tokens of a unit lie (RowGather)
  __device__ uint32_t* row_offsets() const {
    static_assert((kConsumerWarpgroups * kWarpgroupTokens + kNormalTokenTile) * sizeof(float) <=
                  kRouteBatch * sizeof(RouteTarget));
    return reinterpret_cast<uint32_t*>(row_amax() + kConsumerWarpgroups * kWarpgroupTokens);
  }
  // swapAB: [warpgroups][max_rows]
  __device__ RowSource* sources() const { return reinterpret_cast<RowSource*>(row_amax() + kConsumerWarps * max_rows); }
  // swapAB: [warpgroups][max_rows][kDownTileRowBytes], swizzled
  __device__ uint8_t* down_tile(int warpgroup) const {
    return reinterpret_cast<uint8_t*>(sources() + kConsumerWarpgroups * max_rows) +
           warpgroup * max_rows * kDownTileRowBytes;
  }

  __device__ uint8_t* weights(int stage) const {
    return shared_memory() + ring_offset_ + stage * stage_bytes(max_rows);
  }
  __device__ uint8_t* tokens(int stage) const { return weights(stage) + Orientation::kStageWeightBytes; }
  __device__ float* token_scales(int stage) const {
    return reinterpret_cast<float*>(tokens(stage) + token_bytes(max_rows));
  }

 private:
  // The normal orientation's consumers have no register for it.
  __device__ uint8_t* scratch() const {
    return shared_memory() + (Orientation::kSwapsOperands ? scratch_offset_ : header().plan_end);
  }

  __host__ __device__ static int ring_begin(const Plan& plan, int rows) {
    const int targets = kRouteBatch * static_cast<int>(sizeof(RouteTarget));
    constexpr int kRowBytes = kConsumerWarps * static_cast<int>(sizeof(float)) +
                              kConsumerWarpgroups * (static_cast<int>(sizeof(RowSource)) + kDownTileRowBytes);
    const int epilogue = Orientation::kSwapsOperands ? rows * kRowBytes : 0;
    return round_up(plan.end() + (targets > epilogue ? targets : epilogue), 1024);
  }
  __host__ __device__ static int token_bytes(int rows) { return Orientation::kStageBlocks * rows * kBlockK; }
  __host__ __device__ static int stage_bytes(int rows) {
    const int scales = Orientation::kStageBlocks * Orientation::kActivationScalesPerBlock * rows;
    return Orientation::kStageWeightBytes + token_bytes(rows) +
           round_up(scales * static_cast<int>(sizeof(float)), 1024);
  }

  int scratch_offset_;
  int ring_offset_;
};

// Position in the ring; every role walks the same sequence of stages.
struct StageCursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int num_stages) {
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One thread. (Several lanes side by side take 2 us longer: only a thread that is alone gets the fast kind of initialisation.) A stage is
// shared by `ctas` CTAs, whose consumers all leave it before it is free. Its tokens come by one thread's copies, or also by those of the
// warps that gather rows.
__device__ __forceinline__ void init_pipeline(SharedHeader& header, uint32_t ctas, bool gathers_rows) {
#pragma unroll
  for (int stage = 0; stage < kMaxStages; ++stage) {
    ptx::mbarrier_init(&header.weights_full[stage], 1);
    ptx::mbarrier_init(&header.tokens_full[stage], gathers_rows ? kRowWarps * 32 : 1);
    ptx::mbarrier_init(&header.empty[stage], ctas * (kEveryLaneArrives ? kConsumerThreads : kConsumerWarps));
    ptx::mbarrier_init(&header.claimed[stage], 1);
  }
#pragma unroll
  for (SignalQueue& queue : header.signals) {
#pragma unroll
    for (int slot = 0; slot < kSignalSlots; ++slot) {
      ptx::mbarrier_init(&queue.full[slot], 1);
      ptx::mbarrier_init(&queue.empty[slot], 1);
    }
  }
  if (ctas > 1) {
#pragma unroll
    for (uint64_t& published : header.ticket_published) ptx::mbarrier_init(&published, 1);
  }
  ptx::mbarrier_init(&header.planned, 32 + 1);  // the weight producer's warp, and who claims the CTA's place
  ptx::mbarrier_init(&header.dispatched, ctas * (kEveryLaneArrives ? kConsumerThreads : 1));
  ptx::mbarrier_init(&header.vacant_shares_wanted, 1);
  ptx::mbarrier_init(&header.vacant_shares_done, kEveryLaneArrives ? kConsumerThreads : 1);
  header.ids_missing = 0;
  header.vacant_units.places_tried = 0;
  ptx::mbarrier_init_fence();
}

__device__ __forceinline__ void wait_stage(SharedHeader& header, const StageCursor& cursor) {
  await(&header.weights_full[cursor.stage], cursor.parity);
  await(&header.tokens_full[cursor.stage], cursor.parity);
}

// The same in two parts: a question, whose answer takes as long as some multiplies, and later the wait, if one is left. It begins with
// the answer: a branch around the wait would make ptxas serialise the multiplies.
class StageQuery {
 public:
  __device__ __forceinline__ StageQuery(SharedHeader& header, const StageCursor& cursor)
      : weights_full_(&header.weights_full[cursor.stage]),
        tokens_full_(&header.tokens_full[cursor.stage]),
        parity_(cursor.parity),
        weights_landed_(ptx::mbarrier_test_wait(weights_full_, parity_)),
        tokens_landed_(ptx::mbarrier_test_wait(tokens_full_, parity_)) {}

  __device__ __forceinline__ void wait() const {
    await(weights_full_, parity_, weights_landed_);
    await(tokens_full_, parity_, tokens_landed_);
  }

 private:
  uint64_t* weights_full_;
  uint64_t* tokens_full_;
  uint32_t parity_;
  bool weights_landed_;
  bool tokens_landed_;
};

// One arrival per consumer warp, in every CTA that shares the stage: the warp has no more use of it.
template <typename Orientation>
__device__ __forceinline__ void release_stage(const MoeArguments& args, SharedHeader& header, int stage) {
  __syncwarp();
  const uint32_t lane = threadIdx.x % 32;
  if constexpr (Orientation::kSwapsOperands) {
    if (kEveryLaneArrives || lane == 0) ptx::mbarrier_arrive(&header.empty[stage]);
  } else if constexpr (kEveryLaneArrives) {
    for (uint32_t rank = 0; rank < Cluster<Orientation>(args).ctas(); ++rank) {
      ptx::mbarrier_arrive_in_cluster(&header.empty[stage], rank);
    }
  } else {
    if (lane < Cluster<Orientation>(args).ctas()) ptx::mbarrier_arrive_in_cluster(&header.empty[stage], lane);
  }
}

// Announcing finished work means waiting until every store before it is visible to the whole device, a microsecond or two
// under load. A thread of its own does that for each consumer warpgroup, or for both, so that the consumers go on to the next unit.
class Signaller {
 public:
  __device__ explicit Signaller(SignalQueue& queue) : queue_(queue) {}

  // One consumer thread, after a barrier of the threads whose stores are announced. Null ends the signal thread.
  __device__ __forceinline__ void post(uint32_t* counter) {
    await(&queue_.empty[cursor_.stage], cursor_.parity ^ 1);
    queue_.counter[cursor_.stage] = counter;
    ptx::mbarrier_arrive(&queue_.full[cursor_.stage]);
    cursor_.advance(kSignalSlots);
  }

 private:
  SignalQueue& queue_;
  StageCursor cursor_;
};

// A signal thread: `advance(counter)` for each that is posted in one of its queues, until all of these have ended.
template <int kQueues, typename Advance>
__device__ __forceinline__ void serve_signals(SignalQueue* queues, const Advance& advance) {
  StageCursor cursors[kQueues];
  uint32_t open = (1u << kQueues) - 1;
  WaitLimit limit;
  while (open != 0) {
#pragma unroll
    for (int q = 0; q < kQueues; ++q) {
      StageCursor& cursor = cursors[q];
      uint64_t* full = &queues[q].full[cursor.stage];
      if constexpr (kQueues == 1) {
        await(full, cursor.parity);
      } else {
        if ((open >> q & 1) == 0) continue;
        if (!ptx::mbarrier_test_wait(full, cursor.parity)) {  // which never keeps the thread from the other queue
          limit.check();
          continue;
        }
        limit = {};
      }
      uint32_t* counter = queues[q].counter[cursor.stage];
      if (counter == nullptr) {
        open &= ~(1u << q);
        continue;
      }
      ptx::mbarrier_arrive(&queues[q].empty[cursor.stage]);
      advance(counter);
      cursor.advance(kSignalSlots);
    }
  }
}

}  // namespace megamoe
