// The buffer of equal size that every rank of an expert group shares with the others. docs/expert-parallel.md has the protocol.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/workspace.h"

namespace megamoe {

constexpr int kMaxRanks = 32;         // a warp waits for all of them at once
constexpr int kMaxColumnTiles = 512;  // of kDownUnitColumns: hidden sizes up to 65536
constexpr int kPairRankShift = 25;    // a pair of the group: its rank above, its number there below
constexpr int kMaxGroupPairs = 1 << 30;

// What ranks tell each other. Flags hold epochs, which only grow.
struct PeerHeader {
  alignas(128) uint64_t epoch;   // launches that every CTA of this rank has begun
  uint32_t readers;              // CTAs that have read it
  alignas(128) uint32_t failed;  // not zero: a wait came to no end, here or on a rank that said so; for good
  // By rank: all its tokens for this rank's experts are in the images.
  alignas(128) uint64_t tokens_sent[kMaxRanks];
  // By tile and rank: the results of its experts are in these columns of this rank's slots.
  alignas(128) uint64_t columns_done[kMaxColumnTiles][kMaxRanks];
};

// Where things lie in a buffer of `bytes`. What is written before a rank has heard of the reader's launch - ids - lies in the
// same place for every problem that shares the buffer.
class PeerBuffer {
 public:
  PeerBuffer(size_t bytes, void* base) : bytes_(bytes), base_(static_cast<char*>(base)) {}

  // Enough for the problem: [header][ids, even epochs][ids, odd epochs][workspace that others write].
  static size_t bytes_for(const Problem& p) {
    const size_t by_ids = ids_bytes(p) * kIdsShare;
    // Two shares leave (kIdsShare - 2) of them for the rest; rounding takes a little of each.
    const size_t rest = (sizeof(PeerHeader) + Workspace::shared_bytes(p)) / (kIdsShare - 2) * kIdsShare;
    return (by_ids > rest ? by_ids : rest) + 8 * kIdsShare * Workspace::kAlignment;
  }

  PeerHeader* header() const { return reinterpret_cast<PeerHeader*>(base_); }
  // [num_ranks][T * k] words: the epoch's low half and the shape's tag above, the id below.
  uint64_t* ids(int parity) const {
    return reinterpret_cast<uint64_t*>(base_ + header_bytes() + parity * half_bytes());
  }
  void* workspace() const { return base_ + header_bytes() + 2 * half_bytes(); }

  bool holds(const Problem& p) const {
    return p.hidden_size <= kMaxColumnTiles * kDownUnitColumns && ids_bytes(p) <= half_bytes() &&
           header_bytes() + 2 * half_bytes() + Workspace::shared_bytes(p) <= bytes_;
  }

 private:
  // Each half's share of the buffer: little, and enough for hidden sizes from 1024.
  static constexpr size_t kIdsShare = 128;

  static size_t ids_bytes(const Problem& p) { return static_cast<size_t>(p.group_pairs()) * sizeof(uint64_t); }
  static constexpr size_t header_bytes() {
    return (sizeof(PeerHeader) + Workspace::kAlignment - 1) / Workspace::kAlignment * Workspace::kAlignment;
  }
  size_t half_bytes() const { return bytes_ / kIdsShare / Workspace::kAlignment * Workspace::kAlignment; }

  size_t bytes_;
  char* base_;
};

// What stopped a wait, for the host to tell: in memory that both see. `phase` is written last.
struct PeerFailure {
  enum Phase : uint32_t { kNone, kIds, kTokens, kColumns, kOwn };

  uint32_t phase;
  uint32_t peer;
  uint64_t epoch;
};

// The group as device code sees it.
struct Peers {
  int rank;
  int num_ranks;
  int64_t offset[kMaxRanks];  // from an address in the own buffer to the same place in rank r's
  PeerHeader* header;
  uint64_t* ids[2];
  uint64_t limit_nanoseconds;
  PeerFailure* failure;
  uint32_t shape_tag;   // ranks that run different problems don't take each other's ids
  uint32_t delay_seed;  // virtual ranks only
};

}  // namespace megamoe
