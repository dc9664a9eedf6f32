// Tokens' columns on their way to where weights that are decoded want them (`transposed_column`). Lanes of a warp hold
// neighbouring columns; they exchange words of four columns, so that each stores as many neighbouring bytes as it held.
#pragma once

#include <cstdint>

namespace megamoe {

// Of eight lanes, 64 columns. `column` is the lane's first, and then where its words go. `lanes`: those that take part.
__device__ __forceinline__ void transpose_words(uint32_t lanes, uint32_t (&words)[2], int& column) {
  const int lane = threadIdx.x % 8;
  // Lanes l and l + 2 have words that lie side by side, two of each.
  const bool upper = (lane & 2) != 0;
  const uint32_t other = __shfl_xor_sync(lanes, upper ? words[0] : words[1], 2);
  (upper ? words[0] : words[1]) = other;
  column += (lane % 2 * 2 + upper) * 16 + lane / 4 * 8 - lane * 8;
}

}  // namespace megamoe
