// The map of a CTA's shared memory.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/plan.cuh"
#include "kernels/roles.h"
#include "kernels/route_target.cuh"
#include "kernels/shared_header.cuh"
#include "layout/image.h"

namespace megamoe {

constexpr int kDownTileRowBytes = kDownTileColumns * 2;  // bf16
static_assert(kDownTileRowBytes == kBlockK, "swizzled_offset is for rows of this length");

// Of two rows of weights: what the sum over K is multiplied by, and what is added to it.
struct alignas(16) RowTerms {
  float2 scale, bias;

  // `factor`: of the biases, the routing weight in down units.
  __device__ __forceinline__ float low(float sum, float factor = 1.0f) const {
    return fmaf(factor, bias.x, sum * scale.x);
  }
  __device__ __forceinline__ float high(float sum, float factor = 1.0f) const {
    return fmaf(factor, bias.y, sum * scale.y);
  }
};

// What a warp has no registers for while it multiplies a unit: its note, and where the warp's rows came from.
struct alignas(16) KeptUnit {
  UnitNote note;
  RowSource source[kWarpgroupTokens / 4];
};

// Map of a CTA's shared memory: header, plan, epilogue scratch, then as many stages as fit. The token part of a stage
// is sized by the largest chunk of this launch, which every CTA knows from its plan.
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
    ring_offset_ = ring_begin(plan, max_rows, args.constants.assembles_images);
    num_stages = args.constants.stages[max_rows / 8 - 1];
  }

  // How many stages fit; computed on the host. `lone_columns`: of a lone token, if there is one.
  __host__ __device__ static int stages_that_fit(const Plan& plan, int rows, bool assembles_images, int lone_columns) {
    const int fit = (Orientation::kSharedBytes - Orientation::kCodeRingBytes - lone_token_bytes(lone_columns) -
                     ring_begin(plan, rows, assembles_images)) /
                    stage_bytes(rows);
    return fit < kMaxStages ? fit : kMaxStages;
  }

  __device__ static SharedHeader& header() { return shared_header(); }

  __device__ static uint32_t launch() { return header().launch; }
  __device__ static const CounterSet& counters(const MoeArguments& args) {
    return args.constants.counters[launch() % 2];
  }

  // [kRouteBatch], shares the epilogue scratch: tokens are dispatched before the first epilogue.
  using Target = RouteTarget<Orientation::kTokenTile>;
  __device__ Target* route_targets() const { return reinterpret_cast<Target*>(scratch()); }
  // swapAB: [8 warps][max_rows]; normal: [warpgroups][64]
  __device__ float* row_amax() const { return reinterpret_cast<float*>(scratch() + kSwapTermBytes); }
  // normal: [128], behind the maxima: where the tokens of a unit lie (RowGather)
  __device__ uint32_t* row_offsets() const {
    static_assert((kConsumerWarpgroups * kWarpgroupTokens + kNormalTokenTile) * sizeof(float) <=
                  kRouteBatch * sizeof(Target));
    return reinterpret_cast<uint32_t*>(row_amax() + kConsumerWarpgroups * kWarpgroupTokens);
  }
  // normal, where rows have scales: [warpgroups], behind what dispatch needs, as `row_terms`
  __device__ float* kept_row_terms(int warpgroup) const {
    return reinterpret_cast<float*>(scratch() + kScratchBytes + warpgroup * Orientation::kRowTermBytes);
  }
  // normal, where weights are decoded: by warp, behind these terms
  __device__ KeptUnit& kept_unit(int warp) const {
    return reinterpret_cast<KeptUnit*>(scratch() + kScratchBytes + kNormalRowTermBytes)[warp];
  }
  // normal: where images are assembled, behind all else
  __device__ uint8_t* assembly_buffer() const { return scratch() + kScratchBytes + kNormalRowTermBytes; }
  // swapAB: [warpgroups][max_rows]
  __device__ RowSource* sources() const { return reinterpret_cast<RowSource*>(row_amax() + kConsumerWarps * max_rows); }
  // swapAB: [warpgroups][max_rows][kDownTileRowBytes], swizzled
  __device__ uint8_t* down_tile(int warpgroup) const {
    return reinterpret_cast<uint8_t*>(sources() + kConsumerWarpgroups * max_rows) +
           warpgroup * max_rows * kDownTileRowBytes;
  }

  // halves: behind these terms. What a warp keeps of its unit while it is multiplied.
  __device__ UnitNote& kept_note(int warp) const {
    return reinterpret_cast<UnitNote*>(scratch() + kConsumerThreads / 4 * sizeof(RowTerms))[warp];
  }
  // Weights on M, where rows have scales: of this quad of lanes, which have the same two rows; until the unit's
  // epilogue.
  __device__ RowTerms& quad_row_terms() const { return reinterpret_cast<RowTerms*>(scratch())[threadIdx.x / 4]; }
  __device__ uint8_t* weights(int stage) const {
    return shared_memory() + ring_offset_ + stage * stage_bytes(max_rows);
  }
  // What the weight producer brings; it waits there to be decoded, or is multiplied as it is.
  __device__ uint8_t* landing(int stage) const {
    if constexpr (Orientation::kHasDecoders) {
      return shared_memory() + Orientation::kSharedBytes - Orientation::kCodeRingBytes +
             stage * Orientation::kCodeStageBytes;
    } else {
      return weights(stage);
    }
  }
  __device__ uint8_t* tokens(int stage) const { return weights(stage) + Orientation::kStageWeightRoom; }
  // The image of a lone token, at the very end: a whole number of stages of it (kernels/lone_token.cuh).
  __device__ static Image lone_token(int columns) {
    uint8_t* const planes = shared_memory() + Orientation::kSharedBytes - lone_token_bytes(columns);
    float* const scales = reinterpret_cast<float*>(planes + kLoneTokenRows * round_up(columns, kStageColumns));
    return {planes, scales, 0, kLoneTokenRows, columns, columns / kBlockK};
  }
  // Of a unit's first stage: [planes][scales, then biases][kPlaneRows]
  __device__ const float* row_terms(int stage) const {
    return reinterpret_cast<const float*>(weights(stage) + Orientation::kOperandBytes);
  }
  __device__ float* token_scales(int stage) const {
    return reinterpret_cast<float*>(tokens(stage) + token_bytes(max_rows));
  }

 private:
  static constexpr int kStageColumns = Orientation::kStageBlocks * kBlockK;
  // Of the tokens' targets, and whatever else there is one after the other.
  static constexpr int kScratchBytes = kRouteBatch * static_cast<int>(sizeof(Target));

  // normal: `kept_row_terms`.
  static constexpr int kNormalRowTermBytes =
      Orientation::kSwapsOperands ? 0 : kConsumerWarpgroups * Orientation::kRowTermBytes;
  static constexpr int kKeptUnitBytes =
      Orientation::kHasDecoders ? kConsumerWarps * static_cast<int>(sizeof(KeptUnit)) : 0;
  static constexpr int kAssemblyBytes = 2 * kAssemblyPlanes * kAssemblyPieceRows * kBlockK;

  // swapAB: `quad_row_terms`, and in halves `kept_note`, in front of the maxima.
  static constexpr int kSwapTermBytes = Orientation::kSwapsOperands && Orientation::Format::kRowScales
                                            ? kConsumerThreads / 4 * static_cast<int>(sizeof(RowTerms)) +
                                                  (Orientation::kHalves ? kConsumerWarps * sizeof(UnitNote) : 0)
                                            : 0;

  // The normal orientation's consumers have no register for it.
  __device__ uint8_t* scratch() const {
    int offset = Orientation::kSwapsOperands ? scratch_offset_ : header().plan_end;
    // No registers for all the addresses that follow from it: they are worked out where they are needed.
    if constexpr (Orientation::kHalves) asm volatile("" : "+r"(offset));
    return shared_memory() + offset;
  }

  __host__ __device__ static int ring_begin(const Plan& plan, int rows, bool assembles_images) {
    const int targets = kScratchBytes + kNormalRowTermBytes + kKeptUnitBytes +
                        (Orientation::kMayAssembleImages && assembles_images ? kAssemblyBytes : 0);
    constexpr int kRowBytes = kConsumerWarps * static_cast<int>(sizeof(float)) +
                              kConsumerWarpgroups * (static_cast<int>(sizeof(RowSource)) + kDownTileRowBytes);
    const int epilogue = Orientation::kSwapsOperands ? rows * kRowBytes + kSwapTermBytes : 0;
    return round_up(plan.end() + (targets > epilogue ? targets : epilogue), 1024);
  }
  __host__ __device__ static int lone_token_bytes(int columns) {
    const int whole = round_up(columns, kStageColumns);
    return round_up(kLoneTokenRows * (whole + whole / kBlockK * static_cast<int>(sizeof(float))), 1024);
  }
  __host__ __device__ static int token_bytes(int rows) { return Orientation::kStageBlocks * rows * kBlockK; }
  __host__ __device__ static int stage_bytes(int rows) {
    const int scales = Orientation::kStageBlocks * Orientation::kActivationScalesPerBlock * rows;
    return Orientation::kStageWeightRoom + token_bytes(rows) + round_up(scales * static_cast<int>(sizeof(float)), 1024);
  }

  int scratch_offset_;
  int ring_offset_;
};

// Weights on M: takes the terms of a warp's rows from `stage`, the unit's first one, to where its epilogue finds
// them. In registers they would be in the way of the multiply.
template <typename Orientation>
__device__ __forceinline__ void keep_row_terms(const SharedMap<Orientation>& map, int stage) {
  if (threadIdx.x % 4 == 0) {
    // A plane for each warpgroup, and of it a pair of rows for each quad: the low and the high row of a fragment.
    const float2* plane =
        reinterpret_cast<const float2*>(map.row_terms(stage) + threadIdx.x / kWarpgroupThreads * kPlaneRowTerms);
    const int pair = threadIdx.x % kWarpgroupThreads / 4;
    map.quad_row_terms() = {plane[pair], plane[kPlaneRows / 2 + pair]};
  }
  __syncwarp();
}

}  // namespace megamoe
