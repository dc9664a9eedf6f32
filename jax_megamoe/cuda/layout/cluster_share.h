// How two CTAs share an expert's units in the normal orientation (kernels/cluster.cuh).
#pragma once

#include "layout/tiles.h"

namespace megamoe {

// What one CTA of a cluster has of a ticket.
struct ClusterShare {
  int tile;
  int chunk;  // of the expert
  bool idle;  // its partner has a tile and this one has none
  // With the partner, which has another chunk, or another tile.
  bool shares_weights;
  bool shares_tokens;
};

// An expert with `tokens` tokens has a group of tickets for every two of its `tiles`, as many as it has chunks. The
// first are, tile by tile, for two full chunks each: those of more tokens than a warpgroup multiplies, since a smaller
// one would wait for its neighbour in every stage. The others are for two tiles of one chunk, full ones first.
__host__ __device__ inline ClusterShare cluster_share(int tokens, int tiles, int group, int member, int rank) {
  const int full_chunks = (tokens + kNormalTokenTile - kWarpgroupTokens - 1) / kNormalTokenTile;
  const int of_two_chunks = full_chunks / 2;     // tickets, for each tile
  const bool two_tiles = 2 * group + 1 < tiles;  // the last group has only one of an odd number
  ClusterShare share;
  share.shares_weights = member < 2 * of_two_chunks;
  share.shares_tokens = !share.shares_weights && two_tiles;
  const bool second_tile = share.shares_weights ? member >= of_two_chunks : rank == 1;
  share.idle = second_tile && !two_tiles;
  share.tile = 2 * group + (second_tile && two_tiles ? 1 : 0);
  share.chunk = share.shares_weights ? 2 * (member - (second_tile ? of_two_chunks : 0)) + rank : member;
  return share;
}

}  // namespace megamoe
