// Where dispatch writes a route's token.
#pragma once

#include <cstdint>

#include "layout/image.h"

namespace megamoe {

// A row of an image of tokens, worked out once for all its columns. Chunks may have up to `kMostRows` rows.
template <int kMostRows>
struct RouteTarget {
  uint32_t image_row;  // in the image's first plane; rows of 128 bytes, counted over all images
  uint32_t packed;     // rank << 16 | swizzle << 8 | padded rows of the chunk / kRowsUnit

  static constexpr uint32_t kUnused = ~0u;
  static constexpr int kRowsUnit = kMostRows < 256 ? 1 : 8;  // which makes them a byte

  __device__ static RouteTarget unused() { return {kUnused, 0}; }
  // Row `row` of the image that begins at row `first_row`, on `rank`.
  __device__ static RouteTarget at(int rank, int first_row, int row, int padded_rows) {
    return {static_cast<uint32_t>(first_row + row),
            static_cast<uint32_t>(rank << 16 | swizzled_column(row, 0) << 8 | padded_rows / kRowsUnit)};
  }

  __device__ bool used() const { return image_row != kUnused; }
  __device__ int rank() const { return packed >> 16; }
  // The same row in plane `k_block`: also the number of its scale.
  __device__ uint32_t row(uint32_t k_block) const { return image_row + k_block * kRowsUnit * (packed & 0xff); }
  // Where `column` of it lies, from the first byte of all images.
  __device__ uint32_t byte(uint32_t k_block, int column) const {
    return row(k_block) * kBlockK + (column % kBlockK ^ (packed >> 8 & 0xff));
  }
};

// Routes whose targets are in shared memory at a time.
constexpr int kRouteBatch = 256;

}  // namespace megamoe
