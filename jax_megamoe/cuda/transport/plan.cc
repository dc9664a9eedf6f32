#include "transport/plan.h"

#include <cstring>
#include <fstream>
#include <random>

namespace megamoe::transport {

namespace {

bool same(const uint64_t a[2], const uint64_t b[2]) { return a[0] == b[0] && a[1] == b[1]; }

void hash(const std::string& text, uint64_t result[2]) {
  uint64_t first = 0xcbf29ce484222325ull, second = 0x84222325cbf29ce4ull;  // FNV-1a, from two starting values
  for (const unsigned char c : text) {
    first = (first ^ c) * 0x100000001b3ull;
    second = (second ^ c) * 0x100000001b3ull;
  }
  result[0] = first;
  result[1] = second;
}

}  // namespace

std::string make_plan(const std::vector<Introduction>& ranks, int rank, Plan* plan) {
  const Introduction& own = ranks[rank];
  *plan = Plan();
  bool all_have_windows = true;
  for (size_t peer = 0; peer < ranks.size(); ++peer) {
    const Introduction& other = ranks[peer];
    const std::string pair = "rank " + std::to_string(peer) + " and rank " + std::to_string(rank);
    if (other.version != own.version) {
      return pair + " run different versions of jax_megamoe; wanted one: install the same on all hosts";
    }
    if (other.bytes != own.bytes || other.layout != own.layout || other.wanted != own.wanted) {
      return pair + " want symmetric buffers of " + std::to_string(other.bytes) + " and " + std::to_string(own.bytes) +
             " bytes, layouts " + std::to_string(other.layout) + " and " + std::to_string(own.layout) +
             "; wanted equal ones: all ranks have to run the same program on the same shapes";
    }
    for (size_t third = peer + 1; third < ranks.size(); ++third) {
      if (same(other.process, ranks[third].process) && other.device == ranks[third].device) {
        return "rank " + std::to_string(peer) + " and rank " + std::to_string(third) + " are both on device " +
               std::to_string(other.device) + " of one process; wanted one rank per device";
      }
    }
    all_have_windows = all_have_windows && other.has_windows != 0;
    // Compared with rank 0 and not with this rank, so that all ranks come to the same result.
    plan->spans_processes = plan->spans_processes || !same(other.process, ranks[0].process);
    plan->spans_hosts = plan->spans_hosts || !same(other.host, ranks[0].host);
    plan->reach.push_back(static_cast<int>(peer) == rank     ? Reach::kSelf
                          : same(other.process, own.process) ? Reach::kSameProcess
                          : same(other.host, own.host)       ? Reach::kSameHost
                                                             : Reach::kOtherHost);
  }
  plan->may_map = !plan->spans_hosts && own.wanted != Wanted::kWindow;
  plan->may_use_windows = all_have_windows && own.wanted != Wanted::kPeerAccess;
  return {};
}

void identify(Introduction* introduction) {
  std::string boot;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), boot);
  hash(boot, introduction->host);
  struct Token {
    uint64_t words[2];
    Token() { draw_token(words); }
  };
  static const Token process;
  std::memcpy(introduction->process, process.words, sizeof(process.words));
}

void draw_token(uint64_t token[2]) {
  std::random_device source;
  for (int i = 0; i < 2; ++i) token[i] = (static_cast<uint64_t>(source()) << 32) | source();
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
