// Combine: the FP32 sum of a token's used slots, in slot order, rounded once.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/pipeline.cuh"

namespace megamoe {

constexpr int kCombineColumns = 64;  // eight lanes of eight columns
constexpr int kCombineTokens =
    2 * 32 / (kCombineColumns / 8);  // each lane has two tokens, to have more loads on their way

// Bit s of used[t]: token t's slot s is used. Eight neighbouring lanes, which have the same tokens, share the work.
template <typename Group>
__device__ __forceinline__ void find_used_slots(const MoeArguments& args, const int (&tokens)[2], uint32_t (&used)[2]) {
  const Problem& p = args.problem;
  const int num_experts = Group::num_ranks(args) * p.num_experts;
  used[0] = used[1] = 0;
#pragma unroll 1
  for (int slot = threadIdx.x % 8; slot < p.top_k; slot += 8) {
    int experts[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      experts[t] = tokens[t] < p.num_tokens ? __ldg(args.topk_ids + tokens[t] * p.top_k + slot) : -1;
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if (experts[t] >= 0 && experts[t] < num_experts) used[t] |= 1u << slot;
    }
  }
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) {
#pragma unroll
    for (uint32_t& bits : used) bits |= __shfl_xor_sync(~0u, bits, offset);
  }
}

__device__ __forceinline__ void store_sum(const MoeArguments& args, const float (&sum)[8], int token, int column) {
  const size_t offset = static_cast<size_t>(token) * args.problem.hidden_size + column;
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

template <int kSlotsInFlight>
__device__ __forceinline__ void combine_columns(const MoeArguments& args, const int (&tokens)[2],
                                                const uint32_t (&used)[2], int column) {
  const Problem& p = args.problem;
  float sum[2][8] = {};
  // The loads of a few slots are independent of each other; only the additions are in order.
#pragma unroll 1
  for (int base = 0; base < p.top_k; base += kSlotsInFlight) {
    uint4 rows[2][kSlotsInFlight];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const uint16_t* row =
          args.workspace.slot_outputs + (static_cast<size_t>(tokens[t]) * p.top_k + base) * p.hidden_size + column;
#pragma unroll
      for (int i = 0; i < kSlotsInFlight; ++i, row += p.hidden_size) {
        // An unused slot adds zero, which changes no sum that began with +0.
        rows[t][i] = make_uint4(0, 0, 0, 0);
        if (used[t] >> (base + i) & 1) rows[t][i] = __ldcg(reinterpret_cast<const uint4*>(row));
      }
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int i = 0; i < kSlotsInFlight; ++i) {
        const uint32_t words[4] = {rows[t][i].x, rows[t][i].y, rows[t][i].z, rows[t][i].w};
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          sum[t][c] += __uint_as_float(c % 2 == 0 ? words[c / 2] << 16 : words[c / 2] & 0xffff0000u);
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    if (tokens[t] < p.num_tokens) store_sum(args, sum[t], tokens[t], column);
  }
}

// Where results did not come: numbers that nobody takes for results.
__device__ __forceinline__ void store_nothing(const MoeArguments& args, const int (&tokens)[2], int column) {
  float nan[8];
  for (float& value : nan) value = __uint_as_float(0x7fc00000u);
  for (int token : tokens) {
    if (token < args.problem.num_tokens) store_sum(args, nan, token, column);
  }
}

// Waits until down units [first, end) of all ranks' experts are done. One warp; returns whether they are.
template <bool kSwap, typename Group>
__device__ __forceinline__ bool wait_for_units(const MoeArguments& args, int num_chunks, int first, int end) {
  if constexpr (Group::kHasPeers) {
    return Group::wait_for_ranks(args, args.peers.header->columns_done[first], end - first, shared_header().epoch,
                                 PeerFailure::kColumns);
  } else {
    const uint32_t signals = num_chunks * Orientation<kSwap>::kDownSignals;
    for (int unit = first + threadIdx.x % 32; unit < end; unit += 32) {
      ptx::wait_until_at_least(SharedMap<kSwap>::counters(args).down_done(unit), signals);
    }
    __syncwarp();
    return true;
  }
}

// All consumer warps of all CTAs: items of (64 columns, 8 tokens). swapAB takes each as soon as its columns are complete, so
// that warps go through the columns side by side. In the normal orientation units go expert by expert, and all columns are
// complete at about the same time: each warp has neighbouring columns of the same tokens, whose slots it looks up once.
template <bool kSwap, typename Group>
__device__ __forceinline__ void combine_tokens(const MoeArguments& args, int num_chunks) {
  using O = Orientation<kSwap>;
  const Problem& p = args.problem;
  const int lane = threadIdx.x % 32;
  const int column_tiles = p.hidden_size / kCombineColumns;
  const int items = column_tiles * ceil_div(p.num_tokens, kCombineTokens);
  const int warp = threadIdx.x / 32 * gridDim.x + blockIdx.x, warps = gridDim.x * kConsumerWarps;
  const int share = ceil_div(items, warps);
  constexpr int kUnitColumns = O::kUnitTiles * kDownUnitColumns;
  bool complete = true;
  if constexpr (!kSwap) {
    complete = wait_for_units<kSwap, Group>(args, num_chunks, 0, ceil_div(p.hidden_size, kUnitColumns));
  }
  const int end = kSwap ? items : min(items, (warp + 1) * share);
  int token_group = -1;
  int tokens[2];
  uint32_t used[2];
#pragma unroll 1
  for (int item = kSwap ? warp : warp * share; item < end; item += kSwap ? warps : 1) {
    const int column = item % column_tiles * kCombineColumns;
    if (item / column_tiles != token_group) {
      token_group = item / column_tiles;
      tokens[0] = token_group * kCombineTokens + lane / 8;
      tokens[1] = tokens[0] + kCombineTokens / 2;
      find_used_slots<Group>(args, tokens, used);
    }
    if constexpr (kSwap) {
      const int unit = column / kUnitColumns;
      complete = wait_for_units<kSwap, Group>(args, num_chunks, unit, unit + 1);
    }
    if (complete) {
      combine_columns<O::kSlotsInFlight>(args, tokens, used, column + lane % 8 * 8);
    } else {
      store_nothing(args, tokens, column + lane % 8 * 8);
    }
  }
}

}  // namespace megamoe
