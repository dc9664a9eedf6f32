// Combine: the FP32 sum of a token's used slots, in slot order, rounded once.
//
// Work is cut into items of 64 columns of 8 tokens, one warp each. A warp waits until the down units of its columns are
// complete, adds the slots, stores the sum, and drops the slots from the L2.
//   swapAB: combine_as_columns_complete, from the L2 to registers
//   Normal: CombineStream, through what was the ring, several steps ahead
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/bf16.cuh"
#include "common/bounded_wait.cuh"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/l2.cuh"
#include "common/ptx/memory_order.cuh"
#include "common/ptx/warp.cuh"
#include "kernels/row_gather.cuh"
#include "kernels/shared_map.cuh"

namespace megamoe {

constexpr int kCombineColumns = 64;  // eight lanes of eight columns
constexpr int kCombineTokens =
    2 * 32 / (kCombineColumns / 8);  // each lane has two tokens, to have more loads on their way

// ---- what both have in common
// Bit s of used[t]: token t's slot s is used. Eight neighbouring lanes, which have the same tokens, share the work.
template <typename Group>
__device__ __forceinline__ void find_used_slots(const MoeArguments& args, const int (&tokens)[2], uint32_t (&used)[2]) {
  const Problem& p = args.problem;
  const int num_experts = Group::num_ranks(args) * p.num_local_experts;
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

// sum += eight bf16 columns.
__device__ __forceinline__ void add_columns(float (&sum)[8], const uint4& row) {
#pragma unroll
  for (int c = 0; c < 8; ++c) sum[c] += bf16::value(row, c);
}

template <typename Group>
__device__ __forceinline__ const uint16_t* slot_columns(const MoeArguments& args, int token, int slot, int column) {
  const Problem& p = args.problem;
  return Group::own(args.workspace.slot_outputs) + (static_cast<size_t>(token) * p.top_k + slot) * p.hidden_size +
         column;
}

// Drops up to eight slots, from `base` on, of the columns that eight neighbouring lanes have: a line each. All lanes
// have read them.
template <typename Group>
__device__ __forceinline__ void discard_slots(const MoeArguments& args, const int (&tokens)[2], int base, int column) {
  static_assert(kCombineColumns * sizeof(uint16_t) == ptx::kLineBytes);
  __syncwarp();
  const int lane = threadIdx.x % 8;
#pragma unroll
  for (int token : tokens) {
    if (token < args.problem.num_tokens && base + lane < args.problem.top_k) {
      ptx::discard_line(slot_columns<Group>(args, token, base + lane, column - 8 * lane));
    }
  }
}

// The same for quantised rows (row_gather.cuh), which nobody needs once a column of all down units is complete. A line
// is as long as two items are wide.
__device__ __forceinline__ void discard_rows(const MoeArguments& args, const int (&tokens)[2], int column) {
  if (column % ptx::kLineBytes != 0) return;
#pragma unroll
  for (int token : tokens) {
    if (token < args.problem.num_tokens) ptx::discard_line(token_row<OneRank>(args, 0, token) + column);
  }
}

// Where results did not come: NaN.
__device__ __forceinline__ void store_nothing(const MoeArguments& args, const int (&tokens)[2], int column) {
  float nan[8];
  for (float& value : nan) value = __uint_as_float(0x7fc00000u);
  for (int token : tokens) {
    if (token < args.problem.num_tokens) store_sum(args, nan, token, column);
  }
}

// Waits until down units [first, end) of all ranks' experts are done. One warp; returns whether they are.
template <typename Orientation, typename Group>
__device__ __forceinline__ bool wait_for_units(const MoeArguments& args, int num_chunks, int first, int end) {
  if constexpr (Group::kHasPeers) {
    return Group::wait_for_ranks(args, own_peer_header()->columns_done[first], end - first, shared_header().epoch,
                                 PeerFailure::kColumns, [](int) {});
  } else {
    const uint32_t signals = num_chunks * Orientation::kDownSignals;
    for (int unit = first + threadIdx.x % 32; unit < end; unit += 32) {
      await_at_least(SharedMap<Orientation>::counters(args).down_done(unit), signals);
    }
    __syncwarp();
    return true;
  }
}

// An item is 64 columns of 8 tokens, one warp's: each lane has eight columns of two tokens.
struct CombineItem {
  int column;
  int tokens[2] = {-1, -1};
  uint32_t used[2];

  // The item's place among `column_tiles` * token groups; returns whether its tokens are others than before.
  __device__ bool move_to(int column_tile, int token_group) {
    const int first = token_group * kCombineTokens + threadIdx.x % 32 / 8;
    const bool moved = tokens[0] != first;
    column = column_tile * kCombineColumns + threadIdx.x % 8 * 8;
    tokens[0] = first;
    tokens[1] = first + kCombineTokens / 2;
    return moved;
  }
};

// ---- swapAB
// Columns are complete one after the other; items are taken column by column, and a warp waits for each.
template <typename Orientation, typename Group>
__device__ __forceinline__ void combine_as_columns_complete(const MoeArguments& args, int num_chunks) {
  constexpr int kSlotsInFlight = Orientation::kSlotsInFlight;
  const Problem& p = args.problem;
  const int column_tiles = p.hidden_size / kCombineColumns;
  const int items = column_tiles * ceil_div(p.num_tokens, kCombineTokens);
  CombineItem at;
#pragma unroll 1
  for (int item = threadIdx.x / 32 * gridDim.x + blockIdx.x; item < items; item += gridDim.x * kConsumerWarps) {
    // Where the item is, and whether its columns are complete.
    if (at.move_to(item % column_tiles, item / column_tiles)) find_used_slots<Group>(args, at.tokens, at.used);
    const int unit = item % column_tiles * kCombineColumns / kDownUnitColumns;
    if (!wait_for_units<Orientation, Group>(args, num_chunks, unit, unit + 1)) {
      store_nothing(args, at.tokens, at.column);
      continue;
    }
    // Add the slots. The loads of a few are independent of each other; only the additions are in order.
    float sum[2][8] = {};
#pragma unroll 1
    for (int base = 0; base < p.top_k; base += kSlotsInFlight) {
      uint4 rows[2][kSlotsInFlight];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < kSlotsInFlight; ++i) {
          // An unused slot adds zero, which changes no sum that began with +0.
          rows[t][i] = make_uint4(0, 0, 0, 0);
          if (at.used[t] >> (base + i) & 1) {
            rows[t][i] =
                __ldcg(reinterpret_cast<const uint4*>(slot_columns<Group>(args, at.tokens[t], base + i, at.column)));
          }
        }
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < kSlotsInFlight; ++i) add_columns(sum[t], rows[t][i]);
      }
    }
    // Drop them, and store the sum.
#pragma unroll 1
    for (int base = 0; base < p.top_k; base += 8) discard_slots<Group>(args, at.tokens, base, at.column);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if (at.tokens[t] < p.num_tokens) store_sum(args, sum[t], at.tokens[t], at.column);
    }
  }
}

// ---- Normal
// How many of the first down units are complete, as far as one warp knows.
template <typename Normal, typename Group>
class CompleteUnits {
 public:
  __device__ CompleteUnits(const MoeArguments& args, int num_chunks) : args_(args), num_chunks_(num_chunks) {}

  // Waits for units [0, unit]; returns whether they are.
  __device__ __forceinline__ bool await(int unit) {
    if (unit < complete_) return true;
    if constexpr (Group::kHasPeers) {
      if (!wait_for_units<Normal, Group>(args_, num_chunks_, complete_, unit + 1)) return false;
      complete_ = unit + 1;
    } else {
      // Looks at as many as there are lanes: what is complete already is not read again.
      const uint32_t signals = num_chunks_ * Normal::kDownSignals;
      const int units = args_.constants.down_units.value();
      WaitLimit limit;
      while (true) {
        const int mine = complete_ + static_cast<int>(threadIdx.x % 32);
        const bool done =
            mine < units && ptx::load_acquire(SharedMap<Normal>::counters(args_).down_done(mine)) >= signals;
        complete_ += __clz(__brev(~__ballot_sync(~0u, done)));  // 32 where all lanes are done
        if (unit < complete_) break;
        limit.check();
      }
      __syncwarp();  // a vote orders no memory
    }
    return true;
  }

 private:
  const MoeArguments& args_;
  int num_chunks_;
  int complete_ = 0;
};

// Each warp streams the slots of its items through what was the ring: steps of up to eight slots of an item, three
// steps ahead. It waits for an item's columns before it issues their copies.
template <typename Normal, typename Group>
class CombineStream {
  static constexpr int kSlots = Normal::kSlotsInFlight, kStepsAhead = 3;
  static constexpr int kRowBytes = 32 * 16, kStepBytes = 2 * kSlots * kRowBytes;

 public:
  __device__ __forceinline__ CombineStream(const MoeArguments& args, int num_chunks)
      : args_(args), units_(args, num_chunks), column_tiles_(args.problem.hidden_size / kCombineColumns) {
    // The warp's part of the ring: 16 bytes of each row for each lane.
    constexpr int kBytes = kConsumerWarps * kStepsAhead * kStepBytes;
    static_assert(Normal::kSharedBytes - kBytes >= 32 * 1024, "the header and the plan stay as they are");
    buffer_ = shared_memory() + Normal::kSharedBytes - kBytes + threadIdx.x / 32 * kStepsAhead * kStepBytes +
              threadIdx.x % 32 * 16;

    // The warp's items.
    const int warps = static_cast<int>(gridDim.x) * kConsumerWarps;
    const int warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    const int groups = ceil_div(args.problem.num_tokens, kCombineTokens);
    const int warps_per_group = warps / groups;
    int items;
    if (warps_per_group >= kLeastWarpsPerTokenGroup) {
      // Few tokens: several warps for each eight, with columns far apart, so that all have some that are complete
      // early.
      columns_apart_ = warps_per_group;
      ahead_ = {warp / groups, warp % groups};
      items = warp < groups * warps_per_group ? ceil_div(column_tiles_ - ahead_.column_tile, columns_apart_) : 0;
    } else {
      // Many tokens: neighbouring columns, since most of the sum comes after the last unit anyway.
      columns_apart_ = 1;
      const int all = column_tiles_ * groups, share = ceil_div(all, warps), first = warp * share;
      ahead_ = {first % column_tiles_, first / column_tiles_};
      items = min(all - first, share);
    }
    here_ = ahead_;
    steps_ = max(0, items) * ceil_div(args.problem.top_k, kSlots);
  }

  __device__ __forceinline__ void run() {
    CombineItem ahead, at;
    int complete_steps = steps_;  // fewer once columns do not come
    for (int step = 0; step < kStepsAhead; ++step) issue(step, step, ahead, complete_steps);
    float sum[2][8] = {};
    int stage = 0;
#pragma unroll 1
    for (int step = 0; step < steps_; ++step) {
      // Add the step's slots.
      ptx::wait_copies<kStepsAhead - 1>();
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < kSlots; ++i) add_columns(sum[t], *reinterpret_cast<const uint4*>(row(stage, t, i)));
      }

      // Drop them, and with the item's last step store its sum.
      static_assert(kSlots == 8);
      at.move_to(here_.column_tile, here_.token_group);
      if (step >= complete_steps) {
        store_nothing(args_, at.tokens, at.column);
      } else {
        discard_slots<Group>(args_, at.tokens, here_.base, at.column);
        // Not in a group, where most rows are of other ranks' tokens, which nobody sums here.
        if (!Group::kHasPeers && here_.base == 0 && gathers_rows<Normal, Group>(args_)) {
          discard_rows(args_, at.tokens, at.column);
        }
        if (here_.base + kSlots >= args_.problem.top_k) {
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            if (at.tokens[t] < args_.problem.num_tokens) store_sum(args_, sum[t], at.tokens[t], at.column);
#pragma unroll
            for (float& value : sum[t]) value = 0.0f;
          }
        }
      }

      // The step takes the place of one that is issued.
      advance(here_);
      issue(step + kStepsAhead, stage, ahead, complete_steps);
      stage = stage + 1 == kStepsAhead ? 0 : stage + 1;
    }
  }

 private:
  struct Position {
    int column_tile;
    int token_group;
    int base = 0;  // the step's first slot
  };

  __device__ __forceinline__ void advance(Position& at) const {
    at.base += kSlots;
    if (at.base < args_.problem.top_k) return;
    at.base = 0;
    at.column_tile += columns_apart_;
    if (at.column_tile < column_tiles_) return;
    at.column_tile = 0;
    ++at.token_group;
  }

  __device__ __forceinline__ uint8_t* row(int stage, int t, int slot) const {
    return buffer_ + stage * kStepBytes + (t * kSlots + slot) * kRowBytes;
  }

  // Issues the copies of a step as one group, which is empty beyond the last step. A slot that is not used adds zero,
  // which changes no sum that began with +0.
  __device__ __forceinline__ void issue(int step, int stage, CombineItem& item, int& complete_steps) {
    if (step < complete_steps) {
      const int unit = ahead_.column_tile * kCombineColumns / (Normal::kUnitTiles * kDownUnitColumns);
      if (units_.await(unit)) {
        if (item.move_to(ahead_.column_tile, ahead_.token_group)) find_used_slots<Group>(args_, item.tokens, item.used);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
          for (int i = 0; i < kSlots; ++i) {
            const bool used = item.used[t] >> (ahead_.base + i) & 1;
            const uint16_t* source =
                slot_columns<Group>(args_, used ? item.tokens[t] : 0, used ? ahead_.base + i : 0, item.column);
            ptx::copy_async_16(row(stage, t, i), source, used);
          }
        }
        advance(ahead_);
      } else {
        complete_steps = step;
      }
    }
    ptx::commit_copies();
  }

  const MoeArguments& args_;
  CompleteUnits<Normal, Group> units_;
  int column_tiles_;
  int columns_apart_;
  int steps_;
  Position ahead_, here_;  // of the step that is issued next, and of the one that is added next
  uint8_t* buffer_;
};

// All consumer warps of all CTAs.
template <typename Orientation, typename Group>
__device__ __forceinline__ void combine_tokens(const MoeArguments& args, int num_chunks) {
  if constexpr (Orientation::kSwapsOperands) {
    combine_as_columns_complete<Orientation, Group>(args, num_chunks);
  } else {
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);  // both warpgroups have left the ring
    CombineStream<Orientation, Group>(args, num_chunks).run();
  }
}

}  // namespace megamoe
