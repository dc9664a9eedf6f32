// The shared-memory ring between the producers and the consumers, and the map of a CTA's shared memory.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"
#include "kernels/plan.cuh"
#include "kernels/roles.h"

namespace megamoe {

// Told by the weight producer in the first stage of every unit.
struct UnitNote {
  int tile;  // negative: no more units
  int chunk;
  int row_base;
  int rows_and_down;

  static constexpr int kEnd = -1;

  __device__ static UnitNote of(const Unit& u) { return {u.tile, u.chunk, u.row_base, u.rows * 2 + u.down}; }
  __device__ bool end() const { return tile < 0; }
  __device__ bool down() const { return (rows_and_down & 1) != 0; }
  __device__ int rows() const { return rows_and_down >> 1; }
  __device__ int padded_rows() const { return round_up(rows(), 8); }
};

// Fixed part of shared memory.
struct SharedHeader {
  uint64_t full[kMaxStages];            // weights and tokens of the stage have landed: two arrivals plus bytes
  uint64_t empty[kMaxStages];           // every consumer warp has finished with the stage
  uint64_t claimed[kMaxStages];         // the weight producer has taken the stage; the token producer may fill its part
  uint64_t signal_full[kSignalSlots];   // a counter waits to be advanced
  uint64_t signal_empty[kSignalSlots];  // ... and has been
  uint32_t* signal[kSignalSlots];
  float weight_scale[kMaxStages][kStageScaleFloats];
  UnitNote note[kMaxStages];
};

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
struct SharedMap {
  SharedHeader* header;
  PairTarget* pair_targets;  // [kPairBatch], shares the epilogue scratch: tokens are gathered before the first epilogue
  float* partial;            // swapAB: [N/2][128] warpgroup 1's accumulators of a down tile
  float* row_amax;           // swapAB: [8 warps][N]
  RowSource* sources;        // swapAB: [N]
  float* token_scale;        // [stages][scale floats]
  uint8_t* ring;             // [stages][weights | tokens]
  int scale_floats;
  int stage_bytes;
  int num_stages;

  __device__ static Plan plan(uint8_t* shared, int num_experts) {
    return Plan::at(reinterpret_cast<int*>(shared + sizeof(SharedHeader)), num_experts);
  }

  __device__ static PairTarget* targets(uint8_t* shared, int num_experts) {
    return reinterpret_cast<PairTarget*>(shared + round_up(sizeof(SharedHeader) + Plan::bytes(num_experts), 16));
  }

  __device__ SharedMap(uint8_t* shared, int num_experts, int max_rows) {
    using O = Orientation<kSwap>;
    header = reinterpret_cast<SharedHeader*>(shared);
    pair_targets = targets(shared, num_experts);
    partial = reinterpret_cast<float*>(pair_targets);
    int scratch = kPairBatch * static_cast<int>(sizeof(PairTarget));
    if constexpr (kSwap) {
      row_amax = partial + max_rows / 2 * kWarpgroupThreads;
      sources = reinterpret_cast<RowSource*>(row_amax + kConsumerWarps * max_rows);
      scratch = max(scratch, static_cast<int>(reinterpret_cast<uint8_t*>(sources + max_rows) -
                                              reinterpret_cast<uint8_t*>(partial)));
    }
    token_scale = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(pair_targets) + scratch);
    // The normal path always reads 128 rows, the padding ones included.
    const int rows = kSwap ? max_rows : kNormalTokenTile;
    scale_floats = O::kMaxScaleRowsPerStage * rows;
    stage_bytes = kStageWeightBytes + (kSwap ? 2 : 1) * rows * kBlockK;
    const int scales_offset = static_cast<int>(reinterpret_cast<uint8_t*>(token_scale) - shared);
    num_stages = min(kMaxStages, (kSharedBytes - scales_offset - 1023) /
                                     (stage_bytes + scale_floats * static_cast<int>(sizeof(float))));
    ring = shared + round_up(scales_offset + num_stages * scale_floats * static_cast<int>(sizeof(float)), 1024);
  }

  __device__ uint8_t* weights(int stage) const { return ring + static_cast<size_t>(stage) * stage_bytes; }
  __device__ uint8_t* tokens(int stage) const { return weights(stage) + kStageWeightBytes; }
  __device__ float* token_scales(int stage) const { return token_scale + stage * scale_floats; }
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

__device__ __forceinline__ void init_pipeline(SharedHeader* header) {
  for (int stage = 0; stage < kMaxStages; ++stage) {
    ptx::mbarrier_init(&header->full[stage], 2);
    ptx::mbarrier_init(&header->empty[stage], kConsumerWarps);
    ptx::mbarrier_init(&header->claimed[stage], 1);
  }
  for (int slot = 0; slot < kSignalSlots; ++slot) {
    ptx::mbarrier_init(&header->signal_full[slot], 1);
    ptx::mbarrier_init(&header->signal_empty[slot], 1);
  }
  ptx::mbarrier_init_fence();
}

// One arrival per consumer warp: the warp has no more use of the stage.
__device__ __forceinline__ void release_stage(SharedHeader* header, int stage) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&header->empty[stage]);
}

// Announcing finished work means waiting until every store before it is visible to the whole device, a microsecond or two
// under load. A thread of its own does that, so that the consumers go on to the next unit.
class Signaller {
 public:
  __device__ explicit Signaller(SharedHeader* header) : header_(header) {}

  // Consumer thread 0, after a barrier of the threads whose stores are announced. Null ends the signal thread.
  __device__ __forceinline__ void post(uint32_t* counter) {
    ptx::mbarrier_wait(&header_->signal_empty[cursor_.stage], cursor_.parity ^ 1);
    header_->signal[cursor_.stage] = counter;
    ptx::mbarrier_arrive(&header_->signal_full[cursor_.stage]);
    cursor_.advance(kSignalSlots);
  }

  // The signal thread.
  __device__ __forceinline__ void run() {
    while (true) {
      ptx::mbarrier_wait(&header_->signal_full[cursor_.stage], cursor_.parity);
      uint32_t* counter = header_->signal[cursor_.stage];
      if (counter == nullptr) return;
      ptx::mbarrier_arrive(&header_->signal_empty[cursor_.stage]);
      ptx::add_release(counter, 1);
      cursor_.advance(kSignalSlots);
    }
  }

 private:
  SharedHeader* header_;
  StageCursor cursor_;
};

}  // namespace megamoe
