// Dispatch: quantise the own tokens to E4M3 and write each into the image of every chunk it belongs to, on whatever rank.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/fp8.cuh"
#include "kernels/pipeline.cuh"
#include "kernels/trace.cuh"

namespace megamoe {

// Work is cut into (token, 256 hidden columns) items, one warp each, in contiguous shares per CTA.
constexpr int kGatherColumns = 256;

struct GatherShare {
  Divisor blocks;  // items per token
  int first_item;
  int end_item;

  __device__ explicit GatherShare(const MoeArguments& args) : blocks(args.constants.gather_blocks) {
    const int items = args.problem.num_tokens * blocks.value();  // x would need a terabyte to overflow this
    first_item = min(items, static_cast<int>(blockIdx.x) * args.constants.gather_items_per_cta);
    end_item = min(items, first_item + args.constants.gather_items_per_cta);
  }

  __device__ int token_of(int item) const { return blocks.divide(item); }
  __device__ int first_item_of(int token) const { return token * blocks.value(); }
  __device__ int first_token() const { return token_of(first_item); }
  __device__ int end_token() const { return token_of(end_item + blocks.value() - 1); }
};

// A lane's eight columns of an item, as the caller has them; zeros where there are none.
__device__ __forceinline__ uint4 load_item(const MoeArguments& args, const GatherShare& share, int item) {
  const int token = share.token_of(item);
  const int column = (item - share.first_item_of(token)) * kGatherColumns + threadIdx.x % 32 * 8;
  if (item >= share.end_item || column >= args.problem.hidden_size) return make_uint4(0, 0, 0, 0);
  return __ldg(reinterpret_cast<const uint4*>(args.x + static_cast<size_t>(token) * args.problem.hidden_size + column));
}

// Where byte `column % 128` lies in image row `row`: 16-byte pieces are permuted by the row number (the 128-byte swizzle).
__device__ __forceinline__ int swizzled_column(int row, int column) {
  return ((((column >> 4) ^ row) & 7) << 4) + (column & 15);
}
__device__ __forceinline__ int swizzled_offset(int row, int column) {
  return row * kBlockK + swizzled_column(row, column);
}

// Finds the image row of every pair of tokens [token_begin, token_end) by counting earlier pairs of the same expert. One
// warp; advances plan.before. Batches go in order, so positions depend on the ids alone, not on timing.
template <bool kSwap, typename Group>
__device__ __forceinline__ void place_pairs(const MoeArguments& args, const Plan& plan, const GatherShare& share,
                                            int token_begin, int token_end, PairTarget* targets) {
  constexpr int kTile = Orientation<kSwap>::kTokenTile;
  const int lane = threadIdx.x % 32;
  const int top_k = args.problem.top_k;
  const int first_pair = token_begin * top_k;
  const int end_pair = token_end * top_k;
  int next_expert = first_pair + lane < end_pair ? __ldg(args.topk_ids + first_pair + lane) : -1;
  float next_weight = first_pair + lane < end_pair ? __ldg(args.topk_weights + first_pair + lane) : 0.0f;
  for (int base = first_pair; base < end_pair; base += 32) {
    const int pair = base + lane;
    int expert = next_expert;
    const float weight = next_weight;
    next_expert = pair + 32 < end_pair ? __ldg(args.topk_ids + pair + 32) : -1;
    next_weight = pair + 32 < end_pair ? __ldg(args.topk_weights + pair + 32) : 0.0f;
    if (expert < 0 || expert >= plan.group_experts()) expert = -1;
    const uint32_t peers = __match_any_sync(~0u, expert);
    const int earlier = __popc(peers & ((1u << lane) - 1));
    PairTarget target{-1, 0};
    int position = 0;
    if (expert >= 0) position = plan.before(expert) + earlier;
    __syncwarp();
    if (expert >= 0) {
      if (earlier == 0) plan.before(expert) = position + __popc(peers);
      const int chunk = position / kTile;
      const int row = position - chunk * kTile;
      const int padded = round_up(min(kTile, plan.count(expert) - chunk * kTile), 8);
      const int rank = Group::rank_of_expert(args, expert);
      target = {plan.row_base(expert) + chunk * kTile, row | padded << 8 | rank << 16};
      // One CTA, the owner of the token's first columns, leaves the row's source for the epilogues.
      if (share.first_item_of(pair / top_k) >= share.first_item) {
        Group::on(args, rank, args.workspace.row_sources)[target.chunk_row_base + row] = {
            Group::pair_of_group(args, pair), weight * args.routed_scaling_factor};
      }
    }
    __syncwarp();
    if (pair < end_pair) targets[pair - first_pair] = target;
  }
}

// Quantises one item (lane: eight columns, half a warp: one scale) and stores it for each of the token's used slots.
template <typename Group>
__device__ __forceinline__ void gather_item(const MoeArguments& args, int block, const uint4& packed,
                                            const PairTarget* token_targets) {
  const Problem& p = args.problem;
  const int lane = threadIdx.x % 32;
  const int column = block * kGatherColumns + lane * 8;
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  float values[8];
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    amax = fmaxf(amax, fabsf(values[i]));
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, offset));
  if (column >= p.hidden_size) return;
  const float scale = fp8::token_scale(amax);
  const float reciprocal = __frcp_rn(scale);
  uint32_t bytes[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float q[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) q[j] = fp8::quotient(values[4 * i + j], scale, reciprocal);
    bytes[i] = fp8::pack2(q[0], q[1]) | static_cast<uint32_t>(fp8::pack2(q[2], q[3])) << 16;
  }
  const int k_block = column / kBlockK, k_blocks = p.hidden_size / kBlockK;
  // Some slots at a time, without branches, so that the ways to their addresses overlap.
  constexpr int kSlotsAtOnce = 3;
#pragma unroll 1
  for (int slot = 0; slot < p.top_k; slot += kSlotsAtOnce) {
    PairTarget target[kSlotsAtOnce];
    uint8_t* plane[kSlotsAtOnce];
    float* scales[kSlotsAtOnce];
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i) target[i] = token_targets[min(slot + i, p.top_k - 1)];
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i) {
      // Image rows of 128 bytes before this one, of all chunks and K blocks: fewer than 2^32, as scratch memory has a limit
      // (host/problem.h).
      const uint32_t row = target[i].chunk_row_base * k_blocks + k_block * target[i].padded_rows() + target[i].row();
      plane[i] = Group::on(args, target[i].rank(), args.workspace.token_planes) + static_cast<size_t>(row) * kBlockK +
                 swizzled_column(target[i].row(), column);
      scales[i] = Group::on(args, target[i].rank(), args.workspace.token_scales) + row;
    }
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i) {
      const bool used = slot + i < p.top_k && target[i].chunk_row_base >= 0;
      if (used) *reinterpret_cast<uint2*>(plane[i]) = make_uint2(bytes[0], bytes[1]);
      if (used && lane % 16 == 0) *scales[i] = scale;
    }
  }
}

// This CTA's share of the tokens; all consumer threads. `packed` is the warp's first item, asked for before the weights flood
// the memory queues. Ends by counting the share as done, for all CTAs to know.
template <bool kSwap, typename Group>
__device__ __forceinline__ void gather_tokens(const MoeArguments& args, const Plan& plan, const GatherShare& share,
                                              uint4 packed, PairTarget* targets, Signaller& signaller, Tracer& tracer) {
  const int warp = threadIdx.x / 32;
  const int top_k = args.problem.top_k;
  const int tokens_per_batch = kPairBatch / top_k;
  const int end_token = share.end_token();
  int item = share.first_item + warp;
  constexpr int kItemsInFlight = Orientation<kSwap>::kItemsInFlight;
  uint4 items[kItemsInFlight] = {packed};
#pragma unroll
  for (int i = 1; i < kItemsInFlight; ++i) items[i] = load_item(args, share, item + i * kConsumerWarps);
  for (int token_begin = share.first_token(); token_begin < end_token; token_begin += tokens_per_batch) {
    const int token_end = min(token_begin + tokens_per_batch, end_token);
    if (warp == 0) place_pairs<kSwap, Group>(args, plan, share, token_begin, token_end, targets);
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    if (threadIdx.x == 0) tracer.mark(TraceEvent::kPlaced);
    for (; item < min(share.end_item, share.first_item_of(token_end)); item += kConsumerWarps) {
      const uint4 next = load_item(args, share, item + kItemsInFlight * kConsumerWarps);
      const int token = share.token_of(item);
      gather_item<Group>(args, item - share.first_item_of(token), items[0], targets + (token - token_begin) * top_k);
#pragma unroll
      for (int i = 1; i < kItemsInFlight; ++i) items[i - 1] = items[i];
      items[kItemsInFlight - 1] = next;
    }
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
  }
  if (threadIdx.x == 0) tracer.mark(TraceEvent::kStored);
  // The images are read by the copy engine of every SM.
  ptx::fence_proxy_async_global();
  ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
  if (threadIdx.x == 0) {
    uint32_t* counter = SharedMap<kSwap>::counters(args).quantized_ctas();
    if constexpr (Group::kHasPeers) {
      signaller.post(counter);
    } else {
      ptx::add_release(counter, 1);
    }
  }
}

}  // namespace megamoe
