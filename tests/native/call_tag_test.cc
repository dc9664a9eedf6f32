// By what ranks in different calls tell each other apart. In: "T k H I E R order call_id" per line. Out: the tag.
#include <iostream>

#include "host/peers.h"

int main() {
  megamoe::MoeArguments arguments = {};
  megamoe::Problem& p = arguments.problem;
  int order = 0;
  uint32_t call_id = 0;
  while (std::cin >> p.num_tokens >> p.top_k >> p.hidden_size >> p.intermediate_size >> p.num_local_experts >>
         p.num_ranks >> order >> call_id) {
    p.order = static_cast<megamoe::OperandOrder>(order);
    megamoe::join_peers(&arguments, p, /*rank=*/0, /*view=*/nullptr, /*note=*/nullptr, {1, 1}, call_id);
    std::cout << arguments.peers.call_tag << '\n';
  }
}
