// Reads lines "ahead turn gate_up_run down_run gate_up down experts", where gate_up and down are tickets of a chunk, and
// the number of chunks of each expert; writes "down chunk group" for every ticket of both projections, in their order, a
// line for each plan.
#include <cstdio>
#include <vector>

#include "layout/unit_order.h"

namespace {

struct Chunks {
  std::vector<int> bases;  // of each expert, and one past the last

  int num_experts() const { return static_cast<int>(bases.size()) - 1; }
  int num_chunks() const { return bases.back(); }
  int chunk_base(int expert) const { return bases[expert]; }
  int smallest_chunk() const { return num_chunks(); }
};

}  // namespace

int main() {
  using megamoe::Divisor;
  int ahead, turn, run[2], gate_up, down, experts;
  while (std::scanf("%d %d %d %d %d %d %d", &ahead, &turn, &run[0], &run[1], &gate_up, &down, &experts) == 7) {
    Chunks chunks{{0}};
    for (int e = 0; e < experts; ++e) {
      int count = 0;
      if (std::scanf("%d", &count) != 1) return 1;
      chunks.bases.push_back(chunks.bases.back() + count);
    }
    const Divisor tickets[2] = {Divisor(gate_up), Divisor(down)};
    const megamoe::Turns turns(ahead, turn, gate_up, down);
    for (int ticket = 0; ticket < chunks.num_chunks() * (gate_up + down); ++ticket) {
      const auto [is_down, index] = megamoe::in_turns(ticket, chunks.num_chunks(), turns);
      const int of_chunk = static_cast<int>(tickets[is_down].value());
      const auto at = megamoe::ticket_place<false>(chunks, is_down, index, tickets[is_down], chunks.num_chunks());
      const int base = chunks.bases[at.expert], num_chunks = chunks.bases[at.expert + 1] - base;
      int first = 0;
      const auto place = megamoe::place_in_run(at, num_chunks, of_chunk, run[is_down], &first);
      std::printf("%d %d %d  ", is_down, base + first + place.member, place.group);
    }
    std::printf("\n");
  }
  return 0;
}
