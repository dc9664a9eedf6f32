// Where things lie in the buffers of a group. In: "T k H I E R" per line. Out, for the call's largest launch: its tokens and its
// scratch beside the buffer; then, for the smallest buffer and one that is an eighth larger: bytes, whether the launch fits, the
// offsets of ids (both parities) and workspace, the bytes of ids and workspace.
#include <iostream>

#include "host/problem.h"
#include "layout/peer_buffer.h"

int main() {
  megamoe::Problem p;
  while (std::cin >> p.num_tokens >> p.top_k >> p.hidden_size >> p.intermediate_size >> p.num_experts >> p.num_ranks) {
    const std::string reason = megamoe::unsupported_reason(p);
    if (!reason.empty()) {
      std::cout << "unsupported\n";
      continue;
    }
    const megamoe::Problem part = megamoe::per_launch(p);
    const size_t bytes = megamoe::PeerBuffer::bytes_for(part);
    std::cout << part.num_tokens << ' ' << megamoe::Workspace::local_bytes(part);
    for (size_t size : {bytes, bytes + bytes / 8}) {
      char* const base = nullptr;
      const megamoe::PeerBuffer buffer(size, base);
      auto offset = [&](void* pointer) { return static_cast<char*>(pointer) - base; };
      std::cout << ' ' << size << ' ' << buffer.holds(part) << ' ' << offset(buffer.ids(0)) << ' '
                << offset(buffer.ids(1)) << ' ' << offset(buffer.workspace()) << ' '
                << part.group_pairs() * sizeof(uint64_t) << ' ' << megamoe::Workspace::shared_bytes(part);
    }
    std::cout << '\n';
  }
}
