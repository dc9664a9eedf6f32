// Reads lines "tokens tiles chunk_tokens" and writes what both CTAs of a cluster have of every ticket, a line each.
#include <cstdio>

#include "layout/cluster_share.h"

int main() {
  int tokens, tiles, chunk_tokens;
  while (std::scanf("%d %d %d", &tokens, &tiles, &chunk_tokens) == 3) {
    const int chunks = megamoe::ceil_div(tokens, chunk_tokens);
    const bool may_share_weights = chunk_tokens == megamoe::kNormalTokenTile;
    for (int group = 0; group < megamoe::ceil_div(tiles, 2); ++group) {
      for (int member = 0; member < chunks; ++member) {
        for (int rank = 0; rank < 2; ++rank) {
          const megamoe::ClusterShare s = megamoe::cluster_share(tokens, tiles, group, member, rank, may_share_weights);
          std::printf("%d %d %d %d %d %d ", s.tile, s.chunk, s.idle, s.shares_weights, s.shares_tokens, rank);
        }
        std::printf("\n");
      }
    }
    std::printf("\n");
  }
  return 0;
}
