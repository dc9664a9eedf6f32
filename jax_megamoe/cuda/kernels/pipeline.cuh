// The shared-memory ring between the producers and the consumers, and the map of a CTA's shared memory.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"
#include "kernels/plan.cuh"
#include "kernels/roles.h"

namespace megamoe {

// (image row and chunk) a pair's token goes to; used while the tokens are gathered.
struct PairTarget {
  int chunk_row_base;  // negative: unused slot
  int row_and_padded;  // row | padded rows << 16
};
constexpr int kPairBatch = 256;

constexpr int kSharedBytes = 232448;  // spec: 227 KiB of dynamic shared memory per CTA on SM90

// Map of a CTA's shared memory: header, plan, epilogue scratch, then as many stages as fit. The token part of a stage is
// sized by the largest chunk of this launch, which every CTA knows from its plan.
template <bool kSwap>
class SharedMap {
 public:
  int scratch_offset;
  int ring_offset;
  int max_rows;
  int num_stages;

  __device__ SharedMap(int num_experts, int largest_chunk) {
    // The normal path always reads 128 rows, the padding ones included.
    max_rows = kSwap ? largest_chunk : kNormalTokenTile;
    scratch_offset = round_up(kSharedHeaderBytes + Plan::bytes(num_experts), 16);
    int scratch_bytes = kPairBatch * static_cast<int>(sizeof(PairTarget));
    if (kSwap) {
      scratch_bytes = max(scratch_bytes, max_rows * static_cast<int>(kConsumerWarps * sizeof(float) +
                                                                     kConsumerWarpgroups * sizeof(RowSource)));
    }
    ring_offset = round_up(scratch_offset + scratch_bytes, 1024);
    num_stages = min(kMaxStages, (kSharedBytes - ring_offset) / stage_bytes());
  }

  __device__ static SharedHeader& header() { return *reinterpret_cast<SharedHeader*>(shared_memory()); }

  __device__ static const CounterSet& counters() { return header().counters; }

  // [kPairBatch], shares the epilogue scratch: tokens are gathered before the first epilogue.
  __device__ PairTarget* pair_targets() const {
    return reinterpret_cast<PairTarget*>(shared_memory() + scratch_offset);
  }
  // swapAB: [8 warps][max_rows]
  __device__ float* row_amax() const { return reinterpret_cast<float*>(shared_memory() + scratch_offset); }
  // swapAB: [warpgroups][max_rows]
  __device__ RowSource* sources() const { return reinterpret_cast<RowSource*>(row_amax() + kConsumerWarps * max_rows); }

  __device__ uint8_t* weights(int stage) const { return shared_memory() + ring_offset + stage * stage_bytes(); }
  __device__ uint8_t* tokens(int stage) const { return weights(stage) + Orientation<kSwap>::kStageWeightBytes; }
  __device__ float* token_scales(int stage) const { return reinterpret_cast<float*>(tokens(stage) + token_bytes()); }

 private:
  __device__ int token_bytes() const { return Orientation<kSwap>::kStageBlocks * max_rows * kBlockK; }
  __device__ int stage_bytes() const {
    const int scales = Orientation<kSwap>::kStageBlocks * kActivationScalesPerBlock * max_rows;
    return Orientation<kSwap>::kStageWeightBytes + token_bytes() + round_up(scales * static_cast<int>(sizeof(float)), 1024);
  }
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

__device__ __forceinline__ void init_pipeline(SharedHeader& header) {
  for (int stage = 0; stage < kMaxStages; ++stage) {
    ptx::mbarrier_init(&header.weights_full[stage], 1);
    ptx::mbarrier_init(&header.tokens_full[stage], 1);
    ptx::mbarrier_init(&header.empty[stage], kConsumerWarps);
    ptx::mbarrier_init(&header.claimed[stage], 1);
  }
  for (SignalQueue& queue : header.signals) {
    for (int slot = 0; slot < kSignalSlots; ++slot) {
      ptx::mbarrier_init(&queue.full[slot], 1);
      ptx::mbarrier_init(&queue.empty[slot], 1);
    }
  }
  ptx::mbarrier_init_fence();
}

__device__ __forceinline__ void wait_stage(SharedHeader& header, const StageCursor& cursor) {
  ptx::mbarrier_wait(&header.weights_full[cursor.stage], cursor.parity);
  ptx::mbarrier_wait(&header.tokens_full[cursor.stage], cursor.parity);
}

// One arrival per consumer warp: the warp has no more use of the stage.
__device__ __forceinline__ void release_stage(SharedHeader& header, int stage) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&header.empty[stage]);
}

// Announcing finished work means waiting until every store before it is visible to the whole device, a microsecond or two
// under load. A thread of its own does that for each consumer warpgroup, so that the consumers go on to the next unit.
class Signaller {
 public:
  __device__ explicit Signaller(SignalQueue& queue) : queue_(queue) {}

  // One consumer thread, after a barrier of the threads whose stores are announced. Null ends the signal thread.
  __device__ __forceinline__ void post(uint32_t* counter) {
    ptx::mbarrier_wait(&queue_.empty[cursor_.stage], cursor_.parity ^ 1);
    queue_.counter[cursor_.stage] = counter;
    ptx::mbarrier_arrive(&queue_.full[cursor_.stage]);
    cursor_.advance(kSignalSlots);
  }

  // The signal thread.
  __device__ __forceinline__ void run() {
    while (true) {
      ptx::mbarrier_wait(&queue_.full[cursor_.stage], cursor_.parity);
      uint32_t* counter = queue_.counter[cursor_.stage];
      if (counter == nullptr) return;
      ptx::mbarrier_arrive(&queue_.empty[cursor_.stage]);
      ptx::add_release(counter, 1);
      cursor_.advance(kSignalSlots);
    }
  }

 private:
  SignalQueue& queue_;
  StageCursor cursor_;
};

}  // namespace megamoe
