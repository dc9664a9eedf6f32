// The buffer of equal size that every rank of an expert group shares with the others. docs/expert-parallel.md has the
// protocol.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "layout/workspace.h"

namespace megamoe {

constexpr int kMaxRanks = 32;         // a warp waits for all of them at once
constexpr int kMaxColumnTiles = 512;  // of kDownUnitColumns: hidden sizes up to 65536
constexpr int kRouteRankShift = 25;   // a route of the group: its rank above, its number there below
constexpr int kMaxGroupRoutes = 1 << 30;

// Flags that ranks set for each other. They hold epochs, which only grow.
struct PeerHeader {
  alignas(128) uint64_t failed;  // a PeerFailure: a wait came to no end, here or on a rank that said so
  uint32_t noted;                // not zero: the failure is noted for the host
  // By rank: all its tokens for this rank's experts are in the images, or in rows of its own.
  alignas(128) uint64_t tokens_sent[kMaxRanks];
  // By tile and rank: the results of its experts are in these columns of this rank's slots.
  alignas(128) uint64_t columns_done[kMaxColumnTiles][kMaxRanks];
};

constexpr size_t kPeerHeaderBytes =
    (sizeof(PeerHeader) + Workspace::kAlignment - 1) / Workspace::kAlignment * Workspace::kAlignment;

// How a rank finds the buffers of its group, its own included. It lies in the rank's own memory, at a place that stays
// while the buffers may be made anew: a captured launch finds the new ones.
struct PeerView {
  uint64_t epoch;      // launches that every CTA of this rank has begun
  uint64_t ids_bytes;  // of each half
  // By rank: the address of the part of its buffer behind header and ids. Once a launch has missed ids, this rank's own
  // for all.
  uint64_t workspace[kMaxRanks];
};

// Where things lie in a buffer: [ids, even epochs][ids, odd epochs][header][workspace that others write]. What is
// written before a rank has heard of the reader's launch - ids - lies in the same place for every problem that shares
// the buffer.
class PeerBuffer {
 public:
  // Enough for the problem, and all with fewer tokens. Some of these need more: where images are not assembled, other
  // ranks write them, and smaller chunks are more. So the last before each of these changes counts, too.
  static size_t bytes_for(const Problem& p) {
    size_t bytes = bytes_for_one(p);
    const int most_written = (kLeastRoutesPerExpertAssembled * p.num_local_experts - 1) / p.top_k;
    for (const int tokens : {p.most_tokens_in_halves(), p.most_tokens_swapped(), most_written}) {
      if (tokens <= 0 || tokens >= p.num_tokens) continue;
      Problem fewer = p;
      fewer.num_tokens = tokens;
      bytes = std::max(bytes, bytes_for_one(fewer));
    }
    return bytes;
  }

  // What a rank has to know of the buffers, all of the same size; `mapped[r]` is rank r's as this rank's device sees
  // it.
  static PeerView view(void* const* mapped, int num_ranks, size_t bytes) {
    PeerView view = {};
    view.ids_bytes = half_bytes(bytes);
    for (int r = 0; r < num_ranks; ++r) {
      view.workspace[r] = reinterpret_cast<uint64_t>(mapped[r]) + 2 * view.ids_bytes + kPeerHeaderBytes;
    }
    return view;
  }

  static bool holds(size_t bytes, const Problem& p) {
    return p.hidden_size <= kMaxColumnTiles * kDownUnitColumns && ids_bytes(p) <= half_bytes(bytes) &&
           kPeerHeaderBytes + 2 * half_bytes(bytes) + Workspace::shared_bytes(p) <= bytes;
  }

  // From a rank's workspace, as a view has it. Ids are [num_ranks][T * k] words: the epoch's low half and the call's
  // tag above, the id below.
  __host__ __device__ static PeerHeader* header(uint8_t* workspace) {
    return reinterpret_cast<PeerHeader*>(workspace - kPeerHeaderBytes);
  }
  __host__ __device__ static uint64_t* ids(uint8_t* workspace, uint64_t ids_bytes, int parity) {
    return reinterpret_cast<uint64_t*>(workspace - kPeerHeaderBytes - (2 - parity) * ids_bytes);
  }

 private:
  // Enough for problems of these sizes alone.
  static size_t bytes_for_one(const Problem& p) {
    const size_t by_ids = ids_bytes(p) * kIdsShare;
    // Two shares leave (kIdsShare - 2) of them for the rest; rounding takes a little of each.
    const size_t rest = (sizeof(PeerHeader) + Workspace::shared_bytes(p)) / (kIdsShare - 2) * kIdsShare;
    return (by_ids > rest ? by_ids : rest) + 8 * kIdsShare * Workspace::kAlignment;
  }

  // Each half's share of the buffer: little, and enough for hidden sizes from 1024.
  static constexpr size_t kIdsShare = 128;

  static size_t ids_bytes(const Problem& p) { return static_cast<size_t>(p.group_routes()) * sizeof(uint64_t); }
  static size_t half_bytes(size_t bytes) { return bytes / kIdsShare / Workspace::kAlignment * Workspace::kAlignment; }
};

// What stopped a wait, in a word that a rank reports to the others and to the host. Zero: nothing did.
struct PeerFailure {
  enum Phase : uint32_t { kNone, kIds, kTokens, kColumns, kOwn, kRankOrder };

  Phase phase;
  int rank;  // that waited in vain
  int peer;  // for this one; kRankOrder: the rank's place in the mesh
  uint64_t epoch;

  static constexpr int kEpochBits = 48, kRankBits = 6;

  __host__ __device__ uint64_t word() const {
    return static_cast<uint64_t>(phase) << (kEpochBits + 2 * kRankBits) |
           static_cast<uint64_t>(rank) << (kEpochBits + kRankBits) | static_cast<uint64_t>(peer) << kEpochBits |
           (epoch & ((uint64_t{1} << kEpochBits) - 1));
  }
  static PeerFailure of(uint64_t word) {
    constexpr uint64_t kRanks = (1 << kRankBits) - 1;
    return {static_cast<Phase>(word >> (kEpochBits + 2 * kRankBits)),
            static_cast<int>(word >> (kEpochBits + kRankBits) & kRanks), static_cast<int>(word >> kEpochBits & kRanks),
            word & ((uint64_t{1} << kEpochBits) - 1)};
  }
};

// The group as device code sees it.
struct Peers {
  PeerView* view;
  int rank;
  int num_ranks;
  const int32_t* mesh_rank;  // where the program takes this rank to be; null or negative: not checked
  uint64_t* note;            // for the host, in memory that both see: a PeerFailure
  uint64_t timeout_nanoseconds;
  uint64_t first_timeout_nanoseconds;  // in the first launch of a call site: other ranks may still be compiling
  uint32_t call_tag;                   // ranks in different calls don't take each other's ids
  uint32_t delay_seed;                 // virtual ranks only
  int late_ctas;                       // virtual ranks only: of each rank, begin when all others are through
};

}  // namespace megamoe
