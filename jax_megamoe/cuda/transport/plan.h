// Who the ranks of a group are to each other: pure decisions over what each has told, the same on every rank.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace megamoe::transport {

enum class Wanted : uint32_t { kAny = 0, kPeerAccess = 1, kWindow = 2 };

// How a rank presents itself to the others; plain bytes, exchanged by an all-gather.
struct Introduction {
  static constexpr uint32_t kVersion = 1;

  uint32_t version;
  int32_t device;       // ordinal in its own process
  uint64_t bytes;       // of the symmetric buffer it wants
  uint64_t host[2];     // the same for all processes on one running kernel
  uint64_t process[2];  // random, one per process: pids repeat between containers
  uint64_t group[2];    // random; rank 0's names the group
  uint32_t layout;      // of what it keeps there
  Wanted wanted;
  uint32_t has_windows;  // whether NCCL can hand out peers' pointers here
};

// How the memory of one rank reaches another.
enum class Reach { kSelf, kSameProcess, kSameHost, kOtherHost };

struct Plan {
  std::vector<Reach> reach;  // of each rank's memory, seen from this rank
  bool spans_processes = false;
  bool spans_hosts = false;
  bool may_map = false;  // peer access and CUDA IPC serve every pair of ranks, as far as is known before trying
  bool may_use_windows = false;
};

// Fills the plan; returns what is wrong with the group, or nothing. `rank` is the caller's.
std::string make_plan(const std::vector<Introduction>& ranks, int rank, Plan* plan);

// This process's and this host's part of an introduction.
void identify(Introduction* introduction);
void draw_token(uint64_t token[2]);

// Sizes that differ by little share a buffer: rounded up to one of eight steps between powers of two, 2 MiB at least.
uint64_t size_class(uint64_t bytes);

}  // namespace megamoe::transport
