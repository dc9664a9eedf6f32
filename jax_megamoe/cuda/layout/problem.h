// The sizes of one call, and what follows from them alone.
#pragma once

#include <cstdint>

#include "layout/thresholds.h"
#include "layout/tiles.h"
#include "layout/weight_format.h"

namespace megamoe {

// Whether tokens and weights change places in the multiply. The rule decides, but for calls whose bits must not depend
// on the number of tokens (kNormal: `batch_invariant` of `moe`), for measurements (`probe crossover`), and for the
// launches of one call, which all take the first one's side.
enum class OperandOrder : int16_t { kByRule, kSwapped, kNormal };

// `num_tokens` and `num_local_experts` are what this device holds; its shared experts are the first of these.
struct Problem {
  int num_tokens;
  int top_k;
  int hidden_size;
  int intermediate_size;
  int num_local_experts;
  int num_ranks = 1;  // of the expert group; each has as many tokens and experts
  OperandOrder order = OperandOrder::kByRule;
  WeightFormat format = WeightFormat::kFp8Block;
  int num_shared_experts = 0;  // with weights of their own, the same on all ranks

  // By routes per expert, of which one rank has as many as several that share the experts. Scratch memory follows from
  // it: it is asked where a program is lowered, too, and never of a device.
  bool swap_operands() const {
    if (order != OperandOrder::kByRule) return order == OperandOrder::kSwapped;
    return num_tokens <= most_tokens_swapped();
  }
  int most_tokens_swapped() const { return most_routes_per_expert_swapped() * num_local_experts / top_k; }
  int most_routes_per_expert_swapped() const {
    if (is_decoded(format)) return kMostRoutesPerExpertSwappedDecoded;
    for (const SwapLimit& limit : kSwapLimits) {
      if (normal_units() < limit.units_per_sm * kMeasuredSms) return limit.routes_per_expert;
    }
    return kLeastSwapLimit;
  }
  // The normal orientation's gate/up units, with a chunk per expert.
  int normal_units() const { return num_local_experts * (intermediate_size / (2 * kGateUpTileColumns)); }
  // swapAB with two CTAs on each SM: few tokens, but enough gate/up units for all CTAs. Shared experts have all tokens,
  // which have to be one chunk.
  bool in_halves() const {
    if (order != OperandOrder::kByRule || !is_decoded(format) || num_tokens > most_tokens_in_halves()) return false;
    const int experts = num_routes() < num_local_experts ? num_routes() : num_local_experts;
    return int64_t{experts} * (intermediate_size / kGateUpTileColumns) >= kLeastUnitsInHalves;
  }
  int most_tokens_in_halves() const {
    const int most = kMostRoutesPerExpertInHalves * num_local_experts / top_k;
    return num_shared_experts > 0 && most > kHalvesTokenTile ? kHalvesTokenTile : most;
  }
  int token_tile() const {
    if (in_halves()) return kHalvesTokenTile;
    if (swap_operands()) return kSwapTokenTile;
    return kNormalTokenTile;
  }
  // In a group: images of tokens are put together from rows on the expert's rank (kernels/image_assembly.cuh),
  // instead of written by the token's.
  bool assembles_images() const {
    return is_normal_in_group() && num_routes() >= kLeastRoutesPerExpertAssembled * num_local_experts;
  }
  // ... or each rank with experts of a token has it as a row once, and rows are gathered as units need them: while the
  // memory is what these wait for. The same for all devices, since a rank writes for another one.
  bool sends_rows() const {
    return is_normal_in_group() && num_routes() <= kMostRoutesPerExpertSent * num_local_experts &&
           normal_units() >= kMeasuredSms;
  }
  // Assembled images go into a ring of so many: of the chunks that CTAs work on, twice, and of two runs of chunks. No
  // more than gate/up units are ahead, or UnitSchedule would take the first down units for some that wait for nothing.
  int image_slots() const {
    const int wanted = 2 * (chunks_at_work() + kRunChunks);
    return most_chunks(wanted < chunks_ahead() ? wanted : chunks_ahead());
  }
  // Then gate/up units are at most so many chunks ahead of down units (layout/unit_order.h), and a ring holds the
  // activations.
  int chunks_ahead() const { return kTurnChunks + chunks_in_hand(); }
  int activation_slots() const { return most_chunks(chunks_ahead() + chunks_in_hand()); }
  // Those whose weights differ from rank to rank.
  __host__ __device__ int num_routed_experts() const { return num_local_experts - num_shared_experts; }
  __host__ __device__ int num_routes() const { return num_tokens * top_k; }
  __host__ __device__ int group_routes() const { return num_ranks * num_routes(); }
  __host__ __device__ int group_experts() const { return num_ranks * num_local_experts; }
  // A chunk is up to `token_tile` tokens of one expert. Whatever the routing, there are no more chunks and rows than
  // this.
  int max_chunks() const {
    return (num_local_experts < group_routes() ? num_local_experts : group_routes()) + group_routes() / token_tile();
  }
  // Chunks are padded to eight rows, the granularity of a swizzled image and of WGMMA's N.
  int max_rows() const { return group_routes() + 7 * max_chunks(); }
  // Of the memory of images: as many, or those of a ring.
  int image_rows() const { return assembles_images() ? image_slots() * token_tile() : max_rows(); }
  int activation_rows() const { return assembles_images() ? activation_slots() * token_tile() : max_rows(); }

 private:
  bool is_normal_in_group() const { return num_ranks > 1 && !swap_operands() && !is_decoded(format); }
  int chunks_at_work() const { return ceil_div(kMaxSms, intermediate_size / (2 * kGateUpTileColumns)); }
  // A run of both projections, and those on which CTAs work.
  int chunks_in_hand() const { return kRunChunks + kDownRunChunks + chunks_at_work(); }
  int most_chunks(int wanted) const { return wanted < max_chunks() ? wanted : max_chunks(); }
};

}  // namespace megamoe
