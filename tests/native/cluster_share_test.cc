// Reads lines "tokens tiles" and writes what both CTAs of a cluster have of every ticket, a line each.
#include <cstdio>

#include "layout/cluster_share.h"

int main() {
  int tokens, tiles;
  while (std::scanf("%d %d", &tokens, &tiles) == 2) {
    const int chunks = megamoe::ceil_div(tokens, megamoe::kNormalTokenTile);
    for (int group = 0; group < megamoe::ceil_div(tiles, 2); ++group) {
      for (int member = 0; member < chunks; ++member) {
        for (int rank = 0; rank < 2; ++rank) {
          const megamoe::ClusterShare s = megamoe::cluster_share(tokens, tiles, group, member, rank);
          std::printf("%d %d %d %d %d %d ", s.tile, s.chunk, s.idle, s.shares_weights, s.shares_tokens, rank);
        }
        std::printf("\n");
      }
    }
    std::printf("\n");
  }
  return 0;
}
