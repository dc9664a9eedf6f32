// Images: how the operand that is not weights lies in memory, so that a plane of it can be copied into a stage as it
// is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/tiles.h"

namespace megamoe {

// Where byte `column % 128` lies in row `row` of a plane: 16-byte pieces are permuted by the row number (the 128-byte
// swizzle, which WGMMA undoes).
__host__ __device__ inline int swizzled_column(int row, int column) {
  return ((((column >> 4) ^ row) & 7) << 4) + (column & 15);
}
__host__ __device__ inline int swizzled_offset(int row, int column) {
  return row * kBlockK + swizzled_column(row, column);
}

// Where weights that are decoded meet column `column`: the 16 words of each 64 columns, four columns a word, are
// transposed as a 4 x 4 matrix. WGMMA gives a thread every fourth word of an operand's row. So these are 16 columns
// side by side, in one group of weights with one exponent, instead of parts of two groups. Its own inverse.
__host__ __device__ constexpr int transposed_column(int column) {
  const int word = column / 4 % 16;
  return column / 64 * 64 + (word % 4 * 4 + word / 4) * 4 + column % 4;
}

// The image of one chunk: its tokens, K = hidden columns, or its activations, K = intermediate columns.
//
//   planes  [K/128][rows][128] e4m3   a plane is 128 columns of all rows, swizzled
//                                  (where weights are decoded, columns lie as `transposed_column` says)
//   scales  [groups][rows] f32        a group is the 128 or 64 columns of a row that share a scale: K/128 or K/64 groups
//
// `rows` are the chunk's tokens, padded to eight. The images of all chunks follow each other without gaps: that of the
// chunk whose first row is `row_base` begins at byte row_base * K, its scales at number row_base * groups.
class Image {
 public:
  // `planes`, `scales`: of all images. `groups` come as two factors where each plane has several.
  __device__ Image(uint8_t* planes, float* scales, int row_base, int rows, int k, int groups, int more_groups = 1)
      : planes_(planes + static_cast<size_t>(row_base) * k),
        scales_(scales + static_cast<size_t>(row_base) * groups * more_groups),
        rows_(rows) {}

  __device__ uint8_t* plane(int k_block) const { return planes_ + static_cast<size_t>(k_block) * rows_ * kBlockK; }
  __device__ float* scales(int group) const { return scales_ + static_cast<size_t>(group) * rows_; }

  // Where an image of K = 128 * `k_blocks` begins, in rows of 128 bytes: with a group for each plane, the number of its
  // first scale too.
  __device__ static int first_row(int row_base, int k_blocks) { return row_base * k_blocks; }

 private:
  uint8_t* planes_;
  float* scales_;
  int rows_;
};

}  // namespace megamoe
