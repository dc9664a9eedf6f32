// Who does what inside a CTA, and what the orientation of the multiply changes.
#pragma once

#include <cstdint>

#include "layout/thresholds.h"
#include "layout/tiles.h"
#include "layout/weight_format.h"

namespace megamoe {

// Two consumer warpgroups multiply; one producer warpgroup holds a weight producer, a token producer and two signallers
// (one thread each), or a weight producer, two warps that gather tokens' rows and one signaller.
constexpr int kConsumerThreads = 256;
constexpr int kConsumerWarps = kConsumerThreads / 32;
constexpr int kWarpgroupThreads = 128;
constexpr int kConsumerWarpgroups = kConsumerThreads / kWarpgroupThreads;
constexpr int kCtaThreads = kConsumerThreads + kWarpgroupThreads;
constexpr int kWeightProducerWarp = kConsumerWarps;
constexpr int kTokenProducerWarp = kConsumerWarps + 1;
constexpr int kFirstSignalWarp = kConsumerWarps + 2;  // one for each consumer warpgroup
// Where rows are gathered, the first signaller serves both warpgroups, and the other one's warp gathers.
constexpr int kSecondRowWarp = kFirstSignalWarp + 1;
constexpr int kRowWarps = 2;
// ... or assembles images (kernels/image_assembly.cuh): pieces of so many rows, so many planes at a time, in two
// halves.
constexpr int kAssemblyWarp = kSecondRowWarp;
constexpr int kAssemblyPieceRows = 8;
constexpr int kAssemblyPlanes = 8;

// A warpgroup more, where weights are decoded into shared memory (kernels/weight_decoder.cuh).
constexpr int kFirstDecoderWarp = kCtaThreads / 32;
constexpr int kDecoderWarps = kWarpgroupThreads / 32;

// Hardware barrier numbers; 0 is __syncthreads.
enum NamedBarrier : uint32_t {
  kConsumersBarrier = 1,       // all consumers
  kFirstWarpgroupBarrier = 2,  // consumer warpgroup w: this + w
  kRowWarpsBarrier = 4,        // the warps that gather rows
  kTokensBarrier = 5,          // who waits for a group's tokens, and who looks after vacant shares
};

// For compute-sanitizer's racecheck, which does not see that a lane that arrives after __syncwarp does so for its whole
// warp.
#ifdef MEGAMOE_RACECHECK
constexpr bool kEveryLaneArrives = true;
#else
constexpr bool kEveryLaneArrives = false;
#endif

constexpr int kMaxStages = 8;
// Stages of weights that wait to be decoded, and notes of units that the token producer has not read yet.
constexpr int kCodeStages = 3;
constexpr int kUnitNotes = 4;
constexpr int kSignalSlots = 4;
// Tickets that the first CTA of a cluster may be ahead of the other: for units of one stage each, a ring of them and
// two more.
constexpr int kTicketSlots = 2 * kMaxStages;

// How tokens and weights lie in the multiply, and which part of an SM a CTA has.
enum class OrientationKind : uint8_t { kSwapAb, kSwapAbHalves, kNormal };

// Spec: of an SM90, and of it a CTA's dynamic part at most; each CTA takes 1 KB more.
constexpr int kSmRegisters = 65536;
constexpr int kSmSharedBytes = 228 * 1024;
constexpr int kCtaReservedBytes = 1024;

// What differs between the orientations besides the multiply itself, side by side.
template <OrientationKind kKind, typename WeightFormat>
struct OrientationConstants {
  using Format = WeightFormat;
  // For so few of weights that are decoded that latencies count: two CTAs on an SM wait beside each other.
  static constexpr bool kHalves = kKind == OrientationKind::kSwapAbHalves;
  static constexpr int kCtasPerSm = kHalves ? 2 : 1;
  // For few tokens per expert: bound by the memory, CTAs alone, everything in a hurry to start and to end.
  static constexpr bool kSwapsOperands = kKind == OrientationKind::kSwapAb || kHalves;
  // Images of tokens may be put together from rows (kernels/image_assembly.cuh), in groups.
  static constexpr bool kMayAssembleImages = kKind == OrientationKind::kNormal && !Format::kDecodes;
  // A launch's only token may be quantised by each CTA (kernels/lone_token.cuh), on one rank. Weights that are not decoded
  // take longer to come than tokens do.
  static constexpr bool kMayHaveLoneToken = kKind == OrientationKind::kSwapAb && Format::kDecodes;
  // With the weights on N, which WGMMA takes from shared memory alone, a warpgroup more decodes them from one ring of
  // stages into another.
  static constexpr bool kHasDecoders = kKind == OrientationKind::kNormal && Format::kDecodes;
  static constexpr int kThreads = kCtaThreads + (kHasDecoders ? kDecoderWarps * 32 : 0);
  // Claims the CTA's place, and has little else to do at the start.
  static constexpr int kClaimWarp = kHasDecoders ? kFirstDecoderWarp : kSecondRowWarp;
  // Weights that are decoded into registers have their columns in another order (transposed_column).
  static constexpr bool kTransposesColumns = Format::kDecodes && !kHasDecoders;
  static constexpr int kTokenTile = kHalves ? kHalvesTokenTile : kSwapsOperands ? kSwapTokenTile : kNormalTokenTile;
  static constexpr int kStageBlocks = kSwapsOperands ? 2 : 1;  // K blocks per stage
  // Neighbouring 128-row tiles of weights that a unit multiplies. Two, where many tokens share them, load a third less
  // per multiply.
  static constexpr int kUnitTiles = kSwapsOperands ? 1 : 2;
  static constexpr int kActivationScaleColumns = activation_scale_columns(kSwapsOperands);
  static constexpr int kActivationScalesPerBlock = kBlockK / kActivationScaleColumns;
  // One tile's weights for 128 columns of K: two planes.
  static constexpr int kBlockWeightBytes = 2 * Format::kPlaneBytes;
  static constexpr int kStageWeightBytes = kStageBlocks * kUnitTiles * kBlockWeightBytes;
  // Scales and biases of a unit's rows, which come with its first stage, behind the weights.
  static constexpr int kRowTermBytes = Format::kRowScales ? kUnitTiles * 2 * kPlaneRowTerms * 4 : 0;
  // As the multiply reads a tile.
  static constexpr int kOperandTileBytes = kHasDecoders ? 2 * kPlaneRows * kBlockK : kBlockWeightBytes;
  static constexpr int kOperandBytes = kStageBlocks * kUnitTiles * kOperandTileBytes;
  static constexpr int kStageWeightRoom = round_up(kOperandBytes + kRowTermBytes, 1024);
  static constexpr int kCodeStageBytes = round_up(kStageWeightBytes + kRowTermBytes, 1024);
  static constexpr int kCodeRingBytes = kHasDecoders ? kCodeStages * kCodeStageBytes : 0;
  static constexpr int kLeastStagesInFlight = kHalves ? 2 : kWeightBytesInFlight / kStageWeightBytes;
  // Who announces a finished unit: each warpgroup for its share, or one thread for all.
  static constexpr int kGateUpSignals = kSwapsOperands ? 1 : kConsumerWarpgroups;
  static constexpr int kDownSignals = kConsumerWarpgroups;
  // Columns of a token that a warp quantises at a time: for few tokens, more warps have some.
  static constexpr int kDispatchColumns = kSwapsOperands ? 256 : 512;
  // Loads that a thread issues before it uses the first: nothing hides the latency of counting ids, quantising tokens
  // and adding slots up, and with thousands of tokens they add up to microseconds.
  static constexpr int kIdsInFlight = kSwapsOperands ? 1 : 16;
  // With decoders there are fewer stages, whose token parts hold the items.
  static constexpr int kItemsInFlight = kSwapsOperands || kHasDecoders ? 2 : 4;
  static constexpr int kSlotsInFlight = kSwapsOperands ? 4 : 8;
  // Per thread: warpgroups pass on to each other what they have at the start. The normal consumers hold 64 x 256 sums
  // and a partial sum of half of that.
  static constexpr int kRegistersAtStart = kSmRegisters / kCtasPerSm / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kHasDecoders ? 24 : kHalves ? 64 : kSwapsOperands ? 72 : 56;
  static constexpr int kDecoderRegisters = kHasDecoders ? 56 : 0;
  static constexpr int kConsumerRegisters = kHalves ? 88 : kSwapsOperands || kHasDecoders ? 216 : 224;
  static_assert(kConsumerWarpgroups * kConsumerRegisters + kProducerRegisters + kDecoderRegisters <=
                kThreads / kWarpgroupThreads * kRegistersAtStart);

  static constexpr int kSharedBytes = kSmSharedBytes / kCtasPerSm - kCtaReservedBytes;

  __device__ static int stages(int k_blocks) { return ceil_div(k_blocks, kStageBlocks); }
};

// swapAB: weights on WGMMA's M dimension, tokens on N, which may be as small as eight. For few tokens per expert.
template <typename Format>
struct SwapAb : OrientationConstants<OrientationKind::kSwapAb, Format> {};
// The same with two CTAs on each SM.
template <typename Format>
struct SwapAbHalves : OrientationConstants<OrientationKind::kSwapAbHalves, Format> {};
// Tokens on M, weights on N. For many.
template <typename Format>
struct Normal : OrientationConstants<OrientationKind::kNormal, Format> {};

}  // namespace megamoe
