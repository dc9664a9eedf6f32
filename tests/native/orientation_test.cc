// Lines of "tokens top_k experts intermediate_size ranks", all of one rank: whether the call is swapAB's.
#include <iostream>

#include "layout/workspace.h"

int main() {
  megamoe::Problem p{};
  p.hidden_size = 1024;
  while (std::cin >> p.num_tokens >> p.top_k >> p.num_local_experts >> p.intermediate_size >> p.num_ranks) {
    std::cout << p.swap_operands() << '\n';
  }
}
