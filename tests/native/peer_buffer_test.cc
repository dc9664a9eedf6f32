// Where things lie in the buffers of a group. In: "T k H I E R order format" per line. Out, for the call's largest launch: its
// tokens and its scratch beside the buffer; then, for the smallest buffer and one that is an eighth larger: bytes,
// whether the launch fits, the offsets of ids (both parities), header and workspace, the bytes of ids, header and
// workspace.
#include <iostream>

#include "host/limits.h"
#include "layout/peer_buffer.h"

int main() {
  megamoe::Problem p;
  int order = 0, format = 0;
  while (std::cin >> p.num_tokens >> p.top_k >> p.hidden_size >> p.intermediate_size >> p.num_local_experts >>
         p.num_ranks >> order >> format) {
    p.order = static_cast<megamoe::OperandOrder>(order);
    p.format = static_cast<megamoe::WeightFormat>(format);
    const std::string reason = megamoe::unsupported_reason(p);
    if (!reason.empty()) {
      std::cout << "unsupported\n";
      continue;
    }
    const megamoe::Problem part = megamoe::per_launch(p);
    const size_t bytes = megamoe::PeerBuffer::bytes_for(part);
    std::cout << part.num_tokens << ' ' << megamoe::Workspace::local_bytes(part);
    for (size_t size : {bytes, bytes + bytes / 8}) {
      char* const memory = reinterpret_cast<char*>(uintptr_t{1} << 40);  // an address is enough
      void* const base = memory;
      const megamoe::PeerView view = megamoe::PeerBuffer::view(&base, 1, size);
      auto offset = [&](void* pointer) { return static_cast<char*>(pointer) - memory; };
      uint8_t* const workspace = reinterpret_cast<uint8_t*>(view.workspace[0]);
      std::cout << ' ' << size << ' ' << megamoe::PeerBuffer::holds(size, part);
      for (int parity : {0, 1}) std::cout << ' ' << offset(megamoe::PeerBuffer::ids(workspace, view.ids_bytes, parity));
      std::cout << ' ' << offset(megamoe::PeerBuffer::header(workspace)) << ' ' << offset(workspace) << ' '
                << part.group_routes() * sizeof(uint64_t) << ' ' << sizeof(megamoe::PeerHeader) << ' '
                << megamoe::Workspace::shared_bytes(part);
    }
    std::cout << '\n';
  }
}
