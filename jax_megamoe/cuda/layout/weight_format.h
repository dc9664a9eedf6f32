// The formats of weights: what the kernels and the memory layout know of each.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/tiles.h"

namespace megamoe {

enum class WeightFormat : int16_t { kFp8Block, kFp8Channel, kMxfp4 };

// E4M3, one scale per 128 x 128 block.
struct Fp8Block {
  static constexpr WeightFormat kFormat = WeightFormat::kFp8Block;
  // Bytes of 64 rows times 128 columns.
  static constexpr int kPlaneBytes = kPlaneRows * kBlockK;
  // Whether weights are decoded before they are multiplied.
  static constexpr bool kDecodes = false;
  // Whether a row's sum is scaled once, when it is complete, instead of block by block, and a bias added.
  static constexpr bool kRowScales = false;
};

// E4M3, one scale per row.
struct Fp8Channel : Fp8Block {
  static constexpr WeightFormat kFormat = WeightFormat::kFp8Channel;
  static constexpr bool kRowScales = true;
};

// E2M1, a power of two for every 32 columns of a row, relative to the row's own (jax_megamoe/weight_layout.py).
struct Mxfp4 {
  static constexpr WeightFormat kFormat = WeightFormat::kMxfp4;
  static constexpr int kGroupColumns = 32;
  static constexpr int kCodeBytes = kPlaneRows * kBlockK / 2;
  static constexpr int kPlaneBytes = kCodeBytes + kPlaneRows * (kBlockK / kGroupColumns);
  static constexpr bool kDecodes = true;
  static constexpr bool kRowScales = true;
};

// swapAB decodes them on their way to the registers that WGMMA takes its A operand from; in the normal orientation they
// are the B operand, which it takes from shared memory alone, and a warpgroup decodes them there.
constexpr bool is_decoded(WeightFormat format) { return format == WeightFormat::kMxfp4; }
static_assert(is_decoded(Fp8Block::kFormat) == Fp8Block::kDecodes);
static_assert(is_decoded(Fp8Channel::kFormat) == Fp8Channel::kDecodes);
static_assert(is_decoded(Mxfp4::kFormat) == Mxfp4::kDecodes);

// Bytes of a matrix of whole planes.
template <typename Format>
__host__ __device__ constexpr size_t weight_bytes(size_t rows, size_t columns) {
  if constexpr (!Format::kDecodes) return rows * columns;
  return rows * columns / (kPlaneRows * kBlockK) * Format::kPlaneBytes;
}

}  // namespace megamoe
