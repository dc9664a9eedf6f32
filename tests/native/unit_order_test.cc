// Reads lines "swap down tickets_per_chunk first_tail smallest run experts", and the number of chunks of each expert;
// writes "expert group chunk" for every ticket, a line for each plan. `run`: chunks of a run, 0 where there are none.
#include <cstdio>
#include <vector>

#include "layout/unit_order.h"

namespace {

struct Chunks {
  std::vector<int> bases;  // of each expert, and one past the last
  int smallest;

  int num_experts() const { return static_cast<int>(bases.size()) - 1; }
  int num_chunks() const { return bases.back(); }
  int chunk_base(int expert) const { return bases[expert]; }
  int smallest_chunk() const { return smallest; }
};

}  // namespace

int main() {
  int swap, down, tickets, first_tail, smallest, run, experts;
  while (std::scanf("%d %d %d %d %d %d %d", &swap, &down, &tickets, &first_tail, &smallest, &run, &experts) == 7) {
    Chunks chunks{{0}, smallest};
    for (int e = 0; e < experts; ++e) {
      int count = 0;
      if (std::scanf("%d", &count) != 1) return 1;
      chunks.bases.push_back(chunks.bases.back() + count);
    }
    const megamoe::Divisor divisor(tickets);
    for (int index = 0; index < chunks.num_chunks() * tickets; ++index) {
      megamoe::TicketPlace at = swap ? megamoe::ticket_place<true>(chunks, down, index, divisor, first_tail)
                                     : megamoe::ticket_place<false>(chunks, down, index, divisor, first_tail);
      int first = 0;
      if (run > 0) {
        const int num_chunks = chunks.bases[at.expert + 1] - chunks.bases[at.expert];
        at = megamoe::place_in_run(at, num_chunks, tickets, run, &first);
      }
      std::printf("%d %d %d  ", at.expert, at.group, first + at.member);
    }
    std::printf("\n");
  }
  return 0;
}
