#include "host/peers.h"

#include <algorithm>

namespace megamoe {

namespace {

uint32_t call_tag(const Problem& p, uint32_t call_id) {
  uint32_t hash = 2166136261u;
  for (uint32_t value :
       {static_cast<uint32_t>(p.num_tokens), static_cast<uint32_t>(p.top_k), static_cast<uint32_t>(p.hidden_size),
        static_cast<uint32_t>(p.intermediate_size), static_cast<uint32_t>(p.num_local_experts),
        static_cast<uint32_t>(p.num_ranks), static_cast<uint32_t>(p.format),
        static_cast<uint32_t>(p.num_shared_experts), static_cast<uint32_t>(p.order), call_id}) {
    hash = (hash ^ value) * 16777619u;
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
  const size_t first = static_cast<size_t>(rank) * p.num_routed_experts();
  arguments->weights = arguments->weights.from_expert(first, p.format, p.hidden_size, p.intermediate_size);
}

void join_peers(MoeArguments* arguments, const Problem& part, int rank, PeerView* view, uint64_t* note,
                const PeerTimeouts& timeouts, uint32_t call_id) {
  Peers& peers = arguments->peers;
  peers = {};
  peers.view = view;
  peers.rank = rank;
  peers.num_ranks = arguments->problem.num_ranks;
  peers.note = note;
  peers.timeout_nanoseconds = timeouts.microseconds * 1000;
  peers.first_timeout_nanoseconds = std::max(timeouts.microseconds, timeouts.first_microseconds) * 1000;
  peers.call_tag = call_tag(arguments->problem, call_id);
  arguments->workspace.carve_shared(part, nullptr);
}

std::string failure_text(uint64_t failure, int rank) {
  const PeerFailure f = PeerFailure::of(failure);
  if (f.phase == PeerFailure::kNone) return {};
  const std::string told = f.rank == rank ? "" : "rank " + std::to_string(rank) + " was told that ";
  const std::string epoch = ", epoch " + std::to_string(f.epoch);
  if (f.phase == PeerFailure::kRankOrder) {
    return told + "rank " + std::to_string(f.rank) + " of XLA's communicator is rank " + std::to_string(f.peer) +
           " of the mesh" + epoch + ": results since then are NaN; pass implementation=\"collective\" for this mesh.";
  }
  return told + "rank " + std::to_string(f.rank) + " waited in vain for rank " + std::to_string(f.peer) + ", phase " +
         phase_name(f.phase) + epoch +
         ": results since then are NaN; see whether that rank is alive and makes the same calls in the same order. The "
         "next "
         "run sets the group up anew.";
}

}  // namespace megamoe
