// Reads lines "T k I E R"; writes what the rings of such a call in a group are like: whether there are any, chunks that
// gate/up units are ahead, slots for images and for activations, most chunks, and the chunks of a turn and of both runs.
#include <iostream>

#include "layout/problem.h"

int main() {
  megamoe::Problem p{};
  p.hidden_size = 128;
  while (std::cin >> p.num_tokens >> p.top_k >> p.intermediate_size >> p.num_local_experts >> p.num_ranks) {
    std::cout << p.assembles_images() << ' ' << p.chunks_ahead() << ' ' << p.image_slots() << ' '
              << p.activation_slots() << ' ' << p.max_chunks() << ' ' << megamoe::kTurnChunks << ' '
              << megamoe::kRunChunks << ' ' << megamoe::kDownRunChunks << '\n';
  }
}
