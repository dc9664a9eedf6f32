// Rows of quantised tokens, brought into the stages one by one.
//
// A plane of a chunk's image comes by one copy. But a token is in the images of all its experts, and these are written
// to the device's memory before the first unit and read from there. Tokens that are quantised once, and kept in the L2,
// save that. The price: two warps find 64 rows each and bring them by copies of 16 bytes a lane, which pays while units
// wait for their weights (host/choices.h). In a group a token crosses the wires once for each rank, too, instead of once
// for each of its experts there.
#pragma once

#include <cstdint>

#include "common/ptx/address.cuh"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/l2.cuh"
#include "kernels/shared_map.cuh"

namespace megamoe {

// Not for swapAB, whose chunks are too small to gain.
template <typename Orientation, typename Group>
constexpr bool kMayGatherRows = !Orientation::kSwapsOperands && !Orientation::Format::kDecodes;

template <typename Orientation, typename Group>
__device__ __forceinline__ bool gathers_rows(const MoeArguments& args) {
  return kMayGatherRows<Orientation, Group> && args.constants.gathers_rows;
}

// The row of one of this rank's tokens on `rank`, where the tokens of all ranks follow each other.
template <typename Group>
__device__ __forceinline__ uint8_t* token_row(const MoeArguments& args, int rank, int token) {
  const size_t row = Group::rank(args) * args.problem.num_tokens + token;
  return Group::on(rank, args.workspace.token_planes) + row * args.problem.hidden_size;
}

// One warp's half of a gate/up unit's rows: the first warp has rows 0 to 3 of each eight, the second one rows 4 to 7. A
// copy of the warp brings 128 columns of four rows, 16 bytes a lane. What pads the chunk is its last row again.
template <typename Normal, typename Group>
class RowGather {
  static constexpr int kLanesPerRow = kBlockK / sizeof(uint4);
  static constexpr int kRowsPerCopy = 32 / kLanesPerRow;
  static constexpr int kRowStep = kRowWarps * kRowsPerCopy;  // from a lane's row to the next
  static constexpr int kCopies = kNormalTokenTile / kRowStep;

 public:
  // All tokens are quantised, and their places known.
  __device__ __forceinline__ RowGather(const MoeArguments& args, const SharedMap<Normal>& map, int row_warp,
                                       const UnitNote& note)
      : rows_(note.rows()), policy_(ptx::keep_policy()) {
    const int lane = threadIdx.x % 32;
    uint32_t* offsets = map.row_offsets() + row_warp * kNormalTokenTile / kRowWarps;
    __syncwarp();  // the unit before has read them
#pragma unroll
    for (int i = lane; i < kRowsPerCopy * kCopies; i += 32) {
      const int row = i % kCopies * kRowStep + row_warp * kRowsPerCopy + i / kCopies;
      const int route = __ldcg(&Group::own(args.workspace.row_sources)[note.row_base + min(row, rows_ - 1)].route);
      // Fits, as scratch memory has a limit (host/limits.h).
      offsets[i] = static_cast<uint32_t>(Group::token_of_route(args, route)) * args.problem.hidden_size;
    }
    __syncwarp();
    offsets_ = reinterpret_cast<const uint4*>(offsets + lane / kLanesPerRow * kCopies);
    const int column = lane % kLanesPerRow * sizeof(uint4);
    columns_ = Group::own(args.workspace.token_planes) + column;
    place_ = swizzled_offset(row_warp * kRowsPerCopy + lane / kLanesPerRow, column);
  }

  // Issues copies of the next 128 columns of every row, into the token part of a stage.
  __device__ __forceinline__ void next_block(uint8_t* tokens) {
    const uint32_t destination = ptx::smem_address(tokens) + place_;
    constexpr int kStepBytes = kRowStep * kBlockK;  // which leaves the swizzle as it is
    static_assert(kRowStep % 8 == 0 && kCopies % 4 == 0);
#pragma unroll
    for (int i = 0; i < kCopies; i += 4) {
      if (i * kRowStep < rows_) {
        const uint4 offset = offsets_[i / 4];
        ptx::copy_async_16_keep(destination + i * kStepBytes, columns_ + offset.x, policy_);
        ptx::copy_async_16_keep(destination + (i + 1) * kStepBytes, columns_ + offset.y, policy_);
        ptx::copy_async_16_keep(destination + (i + 2) * kStepBytes, columns_ + offset.z, policy_);
        ptx::copy_async_16_keep(destination + (i + 3) * kStepBytes, columns_ + offset.w, policy_);
      }
    }
    columns_ += kBlockK;
  }

 private:
  int rows_;
  uint64_t policy_;
  const uint4* offsets_;  // from the first token's row, of this lane's rows
  const uint8_t* columns_;
  uint32_t place_;
};

}  // namespace megamoe
