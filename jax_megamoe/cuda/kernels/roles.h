// Who does what inside a CTA, and what the orientation of the multiply changes.
#pragma once

#include <cstdint>

#include "layout/tiles.h"

namespace megamoe {

// Two consumer warpgroups multiply; one producer warpgroup holds a weight producer, a token producer and two signallers (one
// thread each).
constexpr int kConsumerThreads = 256;
constexpr int kConsumerWarps = kConsumerThreads / 32;
constexpr int kWarpgroupThreads = 128;
constexpr int kConsumerWarpgroups = kConsumerThreads / kWarpgroupThreads;
constexpr int kCtaThreads = kConsumerThreads + kWarpgroupThreads;
constexpr int kWeightProducerWarp = kConsumerWarps;
constexpr int kTokenProducerWarp = kConsumerWarps + 1;
constexpr int kFirstSignalWarp = kConsumerWarps + 2;  // one for each consumer warpgroup
constexpr int kProducerRegisters = 72;
constexpr int kConsumerRegisters = 216;

// Hardware barrier numbers; 0 is __syncthreads.
enum NamedBarrier : uint32_t {
  kConsumersBarrier = 1,       // all consumers
  kFirstWarpgroupBarrier = 2,  // consumer warpgroup w: this + w
};

// For compute-sanitizer's racecheck, which does not see that a lane that arrives after __syncwarp does so for its whole warp.
#ifdef MEGAMOE_RACECHECK
constexpr bool kEveryLaneArrives = true;
#else
constexpr bool kEveryLaneArrives = false;
#endif

constexpr int kMaxStages = 8;
constexpr int kSignalSlots = 4;

// Weights on their way at any time. About 48 KB per SM saturate the memory; what goes beyond that only queues, and every flag,
// atomic and token of the whole device waits in the same queues (docs/performance-log.md, "in flight").
constexpr int kWeightBytesInFlight = 64 * 1024;

// What differs between the two orientations besides the multiply itself.
template <bool kSwap>
struct Orientation {
  static constexpr int kTokenTile = kSwap ? kSwapTokenTile : kNormalTokenTile;
  static constexpr int kStageBlocks = kSwap ? 2 : 1;  // K blocks per stage
  static constexpr int kStageWeightBytes = kStageBlocks * kBlockWeightBytes;
  static constexpr int kStagesInFlight = kWeightBytesInFlight / kStageWeightBytes;
  // The first stages come one by one: tokens are being gathered, and their way through the memory matters more.
  static constexpr int kStagesAtStart = 3;
  // A finished down unit is announced by each warpgroup for its half of the columns, or once for all.
  static constexpr int kDownSignals = kSwap ? kConsumerWarpgroups : 1;

  __device__ static int stages(int k_blocks) { return ceil_div(k_blocks, kStageBlocks); }
};

}  // namespace megamoe
