// Who does what inside a CTA, and what the orientation of the multiply changes.
#pragma once

#include <cstdint>

#include "layout/tiles.h"

namespace megamoe {

// Two consumer warpgroups multiply; one producer warpgroup holds a weight producer, a token producer and a signaller
// (one thread each).
constexpr int kConsumerThreads = 256;
constexpr int kConsumerWarps = kConsumerThreads / 32;
constexpr int kWarpgroupThreads = 128;
constexpr int kCtaThreads = kConsumerThreads + kWarpgroupThreads;
constexpr int kWeightProducerWarp = kConsumerWarps;
constexpr int kTokenProducerWarp = kConsumerWarps + 1;
constexpr int kSignalWarp = kConsumerWarps + 2;
constexpr int kProducerRegisters = 72;
constexpr int kConsumerRegisters = 216;

// Hardware barrier numbers; 0 is __syncthreads.
enum NamedBarrier : uint32_t {
  kConsumersBarrier = 1,       // all consumers
  kFirstWarpgroupBarrier = 2,  // consumer warpgroup 0
};

constexpr int kMaxStages = 12;
constexpr int kSignalSlots = 4;

// What differs between the two orientations besides the multiply itself.
template <bool kSwap>
struct Orientation {
  static constexpr int kTokenTile = kSwap ? kSwapTokenTile : kNormalTokenTile;
  // Hidden columns of one down unit: swapAB splits K between the warpgroups, the normal path takes two row tiles instead.
  static constexpr int kDownUnitColumns = kSwap ? kDownTileColumns : 2 * kDownTileColumns;
  // K blocks of one down stage, always two planes of weights.
  static constexpr int kDownStageBlocks = kSwap ? 2 : 1;
  static constexpr int kMaxScaleRowsPerStage = kSwap ? 4 : 2;  // activation scales of a stage, per token

  __device__ static int gate_up_units(int intermediate_size) { return intermediate_size / kGateUpTileColumns; }
  __device__ static int down_units(int hidden_size) { return hidden_size / kDownUnitColumns; }
  __device__ static int gate_up_stages(int hidden_size) { return hidden_size / kBlockK; }
  __device__ static int down_stages(int intermediate_size) {
    return ceil_div(intermediate_size / kBlockK, kDownStageBlocks);
  }
};

}  // namespace megamoe
