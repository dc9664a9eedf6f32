// Combine: the FP32 sum of a token's used slots, in slot order, rounded once.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/pipeline.cuh"

namespace megamoe {

constexpr int kCombineColumns = 64;  // of a warp's item: eight lanes of eight columns
constexpr int kCombineTokens = 32 / (kCombineColumns / 8);

__device__ __forceinline__ void combine_columns(const MoeArguments& args, int token, int column) {
  const Problem& p = args.problem;
  float sum[8] = {};
  const int first_pair = token * p.top_k;
  // The loads of a few slots are independent of each other; only the additions are in order.
  constexpr int kSlotsInFlight = 8;
  for (int base = 0; base < p.top_k; base += kSlotsInFlight) {
    uint4 rows[kSlotsInFlight];
    bool used[kSlotsInFlight];
#pragma unroll
    for (int i = 0; i < kSlotsInFlight; ++i) {
      const int slot = base + i;
      used[i] = false;
      if (slot >= p.top_k) continue;
      const int pair = first_pair + slot;
      const int expert = __ldg(args.topk_ids + pair);
      used[i] = expert >= 0 && expert < p.num_experts;
      if (used[i]) {
        rows[i] = __ldcg(reinterpret_cast<const uint4*>(args.workspace.slot_outputs +
                                                        static_cast<size_t>(pair) * p.hidden_size + column));
      }
    }
#pragma unroll
    for (int i = 0; i < kSlotsInFlight; ++i) {
      if (!used[i]) continue;
      const uint32_t words[4] = {rows[i].x, rows[i].y, rows[i].z, rows[i].w};
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        sum[c] += __uint_as_float(c % 2 == 0 ? words[c / 2] << 16 : words[c / 2] & 0xffff0000u);
      }
    }
  }
  const size_t offset = static_cast<size_t>(token) * p.hidden_size + column;
  if (args.y_is_f32) {
    float4* y = reinterpret_cast<float4*>(static_cast<float*>(args.y) + offset);
    y[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    y[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  } else {
    __nv_bfloat162 packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[i] = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(args.y) + offset) = *reinterpret_cast<const uint4*>(packed);
  }
}

// All consumer warps of all CTAs: items of (64 columns, 4 tokens), each as soon as its columns are complete.
template <bool kSwap>
__device__ __forceinline__ void combine_tokens(const MoeArguments& args, int num_chunks) {
  const Problem& p = args.problem;
  const int lane = threadIdx.x % 32;
  const int column_tiles = p.hidden_size / kCombineColumns;
  const int items = column_tiles * ceil_div(p.num_tokens, kCombineTokens);
  const uint32_t signals = num_chunks * Orientation<kSwap>::kDownSignals;
  for (int item = threadIdx.x / 32 * gridDim.x + blockIdx.x; item < items; item += gridDim.x * kConsumerWarps) {
    const int column = item % column_tiles * kCombineColumns;
    const int token = item / column_tiles * kCombineTokens + lane / (kCombineColumns / 8);
    if (lane == 0) ptx::wait_until_at_least(SharedMap<kSwap>::counters(args).down_done(column / kDownUnitColumns), signals);
    __syncwarp();
    if (token < p.num_tokens) combine_columns(args, token, column + lane % (kCombineColumns / 8) * 8);
  }
}

}  // namespace megamoe
