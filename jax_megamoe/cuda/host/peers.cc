#include "host/peers.h"

namespace megamoe {

namespace {

uint32_t shape_tag(const Problem& p) {
  uint32_t hash = 2166136261u;
  for (int value : {p.num_tokens, p.top_k, p.hidden_size, p.intermediate_size, p.num_experts, p.num_ranks}) {
    hash = (hash ^ static_cast<uint32_t>(value)) * 16777619u;
    hash ^= hash >> 15;
  }
  return hash;
}

const char* phase_name(uint32_t phase) {
  switch (phase) {
    case PeerFailure::kIds:
      return "routing";
    case PeerFailure::kTokens:
      return "dispatch";
    case PeerFailure::kColumns:
      return "combine";
    default:
      return "local work";
  }
}

}  // namespace

void take_tokens_of_rank(MoeArguments* arguments, int rank) {
  const Problem& p = arguments->problem;
  const size_t first = static_cast<size_t>(rank) * p.num_tokens;
  arguments->x += first * p.hidden_size;
  arguments->topk_ids += first * p.top_k;
  arguments->topk_weights += first * p.top_k;
  arguments->y = static_cast<uint16_t*>(arguments->y) + first * p.hidden_size;
}

void take_experts_of_rank(MoeArguments* arguments, int rank) {
  const Problem& p = arguments->problem;
  const size_t first = static_cast<size_t>(rank) * p.num_experts;
  const size_t gate_up_tiles = p.intermediate_size / kGateUpTileColumns, gate_up_blocks = p.hidden_size / kBlockK;
  const size_t down_tiles = p.hidden_size / kDownTileColumns, down_blocks = p.intermediate_size / kBlockK;
  arguments->gate_up += first * gate_up_tiles * gate_up_blocks * kBlockWeightBytes;
  arguments->gate_up_scale += first * gate_up_tiles * gate_up_blocks * kScaleVectorFloats;
  arguments->down += first * down_tiles * down_blocks * kPlaneBytes;
  arguments->down_scale += first * down_tiles * ((down_blocks + 1) / 2) * kScaleVectorFloats;
}

bool join_peers(MoeArguments* arguments, const Problem& part, int rank, void* const* mapped, size_t bytes,
                PeerFailure* failure, uint64_t limit_microseconds) {
  const Problem& p = arguments->problem;
  const PeerBuffer buffer(bytes, mapped[rank]);
  if (!buffer.holds(part)) return false;
  Peers& peers = arguments->peers;
  peers = {};
  peers.rank = rank;
  peers.num_ranks = p.num_ranks;
  for (int r = 0; r < p.num_ranks; ++r) {
    peers.offset[r] =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(mapped[r]) - reinterpret_cast<uintptr_t>(mapped[rank]));
  }
  peers.header = buffer.header();
  for (int parity = 0; parity < 2; ++parity) peers.ids[parity] = buffer.ids(parity);
  peers.limit_nanoseconds = limit_microseconds * 1000;
  peers.failure = failure;
  peers.shape_tag = shape_tag(p);
  arguments->workspace.carve_shared(part, buffer.workspace());
  return true;
}

std::string failure_text(const PeerFailure& failure, int rank) {
  // Written by the device while this process runs.
  const uint32_t phase = *const_cast<const volatile uint32_t*>(&failure.phase);
  if (phase == PeerFailure::kNone) return {};
  return "rank " + std::to_string(rank) + " waited in vain for rank " + std::to_string(failure.peer) + ", phase " +
         phase_name(phase) + ", epoch " + std::to_string(failure.epoch) +
         ": results since then are NaN; see whether that rank is alive and runs the same program with the same shapes, "
         "and start all processes of the group anew.";
}

}  // namespace megamoe
