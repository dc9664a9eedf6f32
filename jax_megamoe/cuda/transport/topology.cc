#include "transport/topology.h"

#include <algorithm>

namespace megamoe::transport {

namespace {

bool same(const uint64_t a[2], const uint64_t b[2]) { return a[0] == b[0] && a[1] == b[1]; }

}  // namespace

std::string read_topology(const std::vector<Introduction>& ranks, int rank, Topology* topology) {
  const Introduction& own = ranks[rank];
  *topology = Topology();
  // Compared with rank 0 and not with this rank, so that all ranks come to the same result.
  const Introduction& first = ranks[0];
  bool all_have_windows = true;
  topology->generation = first.token;
  topology->keeps_buffers = first.generation != 0;
  for (size_t peer = 0; peer < ranks.size(); ++peer) {
    const Introduction& other = ranks[peer];
    const std::string pair = "rank " + std::to_string(peer) + " and rank " + std::to_string(rank);
    if (other.version != own.version) {
      return pair + " run different versions of jax_megamoe; wanted one: install the same on all hosts";
    }
    if (other.layout != own.layout || other.wanted != own.wanted) {
      return pair + " are in different calls, layouts " + std::to_string(other.layout) + " and " +
             std::to_string(own.layout) + "; wanted the same: all ranks have to run the same program";
    }
    for (size_t third = peer + 1; third < ranks.size(); ++third) {
      if (same(other.identity.process, ranks[third].identity.process) && other.device == ranks[third].device) {
        return "rank " + std::to_string(peer) + " and rank " + std::to_string(third) + " are both on device " +
               std::to_string(other.device) + " of one process; wanted one rank per device";
      }
    }
    all_have_windows = all_have_windows && other.has_windows != 0;
    topology->spans_processes = topology->spans_processes || !same(other.identity.process, first.identity.process);
    topology->spans_hosts = topology->spans_hosts || !same(other.identity.host, first.identity.host);
    topology->reach.push_back(static_cast<int>(peer) == rank                       ? Reach::kSelf
                              : same(other.identity.process, own.identity.process) ? Reach::kSameProcess
                              : same(other.identity.host, own.identity.host)       ? Reach::kSameHost
                                                                                   : Reach::kOtherHost);
    topology->bytes = std::max(topology->bytes, other.bytes);
    topology->keeps_buffers = topology->keeps_buffers && other.generation == first.generation;
    if (topology->group == 0) topology->group = other.group;
  }
  if (topology->group == 0) topology->group = first.token;
  topology->keeps_buffers = topology->keeps_buffers && first.buffer_bytes >= topology->bytes;
  topology->may_map = !topology->spans_hosts && own.wanted != Wanted::kWindow;
  topology->may_use_windows = all_have_windows && own.wanted != Wanted::kPeerAccess;
  return {};
}

uint64_t size_class(uint64_t bytes) {
  constexpr uint64_t kLeast = 2ull << 20;
  if (bytes <= kLeast) return kLeast;
  uint64_t power = kLeast;
  while (power * 2 < bytes) power *= 2;
  const uint64_t step = power / 8;
  return (bytes + step - 1) / step * step;
}

}  // namespace megamoe::transport
