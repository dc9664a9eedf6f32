// Prefetches into the L2: weights that are certain or likely to be read, before a stage is free for them.
#pragma once

#include <cstdint>

#include "common/ptx/bulk_copy.cuh"
#include "kernels/arguments.h"
#include "kernels/roles.h"

namespace megamoe {

__device__ __forceinline__ int clamped_layer(const MoeArguments& args) {
  return args.num_layers == 1 ? 0 : min(max(__ldg(args.layer), 0), args.num_layers - 1);
}

// In which arrays an expert of this rank has its weights, and as which one there.
class ExpertNumbers {
 public:
  __device__ explicit ExpertNumbers(const MoeArguments& args) : problem_(args.problem), layer_(clamped_layer(args)) {}

  __device__ __forceinline__ bool is_shared(int expert) const { return expert < problem_.num_shared_experts; }
  __device__ __forceinline__ size_t in_array(int expert) const {
    const int shared = problem_.num_shared_experts;
    return is_shared(expert) ? layer_ * shared + expert : layer_ * problem_.num_routed_experts() + expert - shared;
  }

 private:
  const Problem& problem_;
  int layer_;
};

template <typename Format>
__device__ __forceinline__ size_t gate_up_bytes(const Problem& p) {
  return weight_bytes<Format>(2 * static_cast<size_t>(p.intermediate_size), p.hidden_size);
}

// Of an expert of this rank.
template <typename Format>
__device__ __forceinline__ const uint8_t* gate_up_weights(const MoeArguments& args, int expert) {
  const Problem& p = args.problem;
  const ExpertNumbers numbers(args);
  const uint8_t* const all = numbers.is_shared(expert) ? args.shared_weights.gate_up : args.weights.gate_up;
  return all + numbers.in_array(expert) * gate_up_bytes<Format>(p);
}

// Until the other ranks' ids are here, nobody knows the units. But the experts of this rank that its own tokens name
// are certain to be read: the CTAs prefetch a part of their weights, as much as may be in flight. One warp.
template <typename Orientation>
__device__ __forceinline__ void prefetch_certain_weights(const MoeArguments& args, int rank) {
  using Format = typename Orientation::Format;
  constexpr size_t kBytes = kWeightBytesInFlight / Orientation::kCtasPerSm;
  const Problem& p = args.problem;
  const int lane = threadIdx.x % 32;
  const int expert = lane < p.num_routes() ? __ldg(args.topk_ids + lane) - rank * p.num_local_experts : -1;
  const uint32_t own = __ballot_sync(~0u, expert >= 0 && expert < p.num_local_experts);
  if (own == 0) return;
  const int count = __popc(own);
  const size_t expert_bytes = gate_up_bytes<Format>(p);
  const size_t begin = static_cast<size_t>(blockIdx.x / count) * kBytes;
  if (!(own >> lane & 1) || __popc(own & ((1u << lane) - 1)) != blockIdx.x % count || begin >= expert_bytes) return;
  ptx::bulk_prefetch(gate_up_weights<Format>(args, expert) + begin,
                     static_cast<uint32_t>(min(expert_bytes - begin, kBytes)));
}

// The first K blocks of a swapAB gate/up unit.
template <typename Orientation>
__device__ __forceinline__ void prefetch_unit(const MoeArguments& args, int expert, int tile, int k_blocks) {
  const size_t tile_blocks = args.problem.hidden_size / kBlockK;
  ptx::bulk_prefetch_stream(
      gate_up_weights<typename Orientation::Format>(args, expert) + tile * tile_blocks * Orientation::kBlockWeightBytes,
      min(k_blocks, static_cast<int>(tile_blocks)) * Orientation::kBlockWeightBytes);
}

// The first stages, two for each SM, of the unit that the CTA gets if every expert has exactly one chunk; before any id
// is read. With as many routes as experts most experts have one, and the memory has nothing else to do. One thread.
template <typename Orientation>
__device__ __forceinline__ void prefetch_likely_unit(const MoeArguments& args) {
  const Problem& p = args.problem;
  const Divisor& tiles = args.constants.gate_up_units;
  const int expert = tiles.divide(blockIdx.x);
  if (p.num_routes() < p.num_local_experts || expert >= p.num_local_experts) return;
  prefetch_unit<Orientation>(args, expert, blockIdx.x - expert * tiles.value(),
                             2 / Orientation::kCtasPerSm * Orientation::kStageBlocks);
}

// The first stage of the CTA's first unit, if that is one of the expert's `chunks` chunks from `first_chunk` on; a
// microsecond before the weight producer comes to it. Only if the CTA has little to dispatch; otherwise the prefetch
// delays that.
template <typename Orientation>
__device__ __forceinline__ void prefetch_first_unit(const MoeArguments& args, int expert, int first_chunk, int chunks) {
  const int tiles = args.constants.gate_up_units.value();
  const int within = static_cast<int>(blockIdx.x) - first_chunk * tiles;
  const bool has_little_to_dispatch = args.constants.dispatch_items_per_cta <= kMostItemsBesidePrefetch ||
                                      (Orientation::kMayHaveLoneToken && args.constants.has_lone_token);
  if (!has_little_to_dispatch || within < 0 || within >= chunks * tiles) return;
  const int tile = chunks == 1 ? within : within / chunks;
  prefetch_unit<Orientation>(args, expert, tile, Orientation::kStageBlocks);
}

}  // namespace megamoe
