#include "host/limits.h"

#include "layout/peer_buffer.h"

namespace megamoe {

std::string unsupported_reason(const Problem& p) {
  auto text = [](int value) { return std::to_string(value); };
  if (p.hidden_size <= 0 || p.hidden_size % kBlockK != 0) {
    return "hidden_size is " + text(p.hidden_size) + "; it has to be a positive multiple of 128.";
  }
  if (p.hidden_size > kMaxColumnTiles * kDownUnitColumns) {
    return "hidden_size is " + text(p.hidden_size) + "; it has to be at most 65536.";
  }
  if (p.intermediate_size <= 0 || p.intermediate_size % kBlockK != 0) {
    return "intermediate_size is " + text(p.intermediate_size) + "; it has to be a positive multiple of 128.";
  }
  if (p.top_k < 1 || p.top_k > kMaxTopK) return "top_k is " + text(p.top_k) + "; it has to be 1 to 32.";
  if (p.num_local_experts < 1 || p.num_local_experts > kMaxExperts) {
    return "the device holds " + text(p.num_local_experts) + " experts; the kernel serves 1 to 1024.";
  }
  if (p.num_ranks < 1 || p.num_ranks > kMaxRanks) {
    return "the expert group has " + text(p.num_ranks) + " ranks; the kernel serves 1 to " + text(kMaxRanks) + ".";
  }
  if (p.num_ranks > 1) {
    if (p.group_experts() > kMaxExperts) {
      return "the expert group has " + text(p.group_experts()) + " experts; the kernel serves 1 to 1024.";
    }
    if (static_cast<int64_t>(p.num_ranks) * p.num_tokens * p.top_k > kMaxGroupRoutes) {
      return "the ranks have " + text(p.num_tokens) + " tokens each; pass at most 2^30 (token, slot) pairs in all.";
    }
  }
  if (p.num_tokens < 1 || p.num_tokens > kMaxTokens) {
    return "there are " + text(p.num_tokens) + " tokens; the kernel serves 1 to " + text(kMaxTokens) + " per call.";
  }
  return "";
}

Problem per_launch(const Problem& problem) {
  Problem part = problem;
  auto bytes = [&] {
    return Workspace::local_bytes(part) +
           (part.num_ranks > 1 ? PeerBuffer::bytes_for(part) : Workspace::shared_bytes(part));
  };
  for (int launches = 2; bytes() > kMaxScratchBytes && part.num_tokens > 1; ++launches) {
    part.num_tokens = ceil_div(problem.num_tokens, launches);
  }
  return part;
}

}  // namespace megamoe
