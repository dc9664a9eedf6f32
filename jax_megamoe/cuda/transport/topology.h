// Who the ranks of a group are to each other: pure decisions over what each has told, the same on every rank.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "transport/identity.h"

namespace megamoe::transport {

enum class Wanted : uint32_t { kAny = 0, kPeerAccess = 1, kWindow = 2 };

// How a rank presents itself to the others; plain bytes, exchanged by an all-gather.
struct Introduction {
  static constexpr uint32_t kVersion = 2;

  uint32_t version;
  int32_t device;  // ordinal in its own process
  Identity identity;
  uint32_t layout;  // of what it keeps in the buffer
  Wanted wanted;
  uint32_t has_windows;   // whether NCCL can hand out peers' pointers here
  uint64_t bytes;         // of the symmetric buffer it wants
  uint64_t generation;    // of the buffer it has: names the set-up in which the ranks made theirs; 0: it has none
  uint64_t buffer_bytes;  // of that
  uint64_t group;         // names the group it belongs to, or 0
  uint64_t token;         // random
  uint64_t failure;       // a failed wait that this rank's process has not raised yet, or 0
};

// How the memory of one rank reaches another.
enum class Reach { kSelf, kSameProcess, kSameHost, kOtherHost };

struct Topology {
  std::vector<Reach> reach;  // of each rank's memory, seen from this rank
  bool spans_processes = false;
  bool spans_hosts = false;
  bool may_map = false;  // peer access and CUDA IPC serve every pair of ranks, as far as is known before trying
  bool may_use_windows = false;
  bool keeps_buffers = false;  // those that are there serve
  uint64_t bytes = 0;          // of the buffers that are needed: the largest wish
  uint64_t group = 0;          // names the group
  uint64_t generation = 0;     // names this set-up
};

// Fills the topology; returns what is wrong with the group, or nothing. `rank` is the caller's.
std::string read_topology(const std::vector<Introduction>& ranks, int rank, Topology* topology);

// Sizes are rounded up to one of eight steps between powers of two, 2 MiB at least, so that few are made anew.
uint64_t size_class(uint64_t bytes);

}  // namespace megamoe::transport
