// The list of GEMM units: which unit a ticket is.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "kernels/arguments.h"
#include "kernels/cluster.cuh"
#include "kernels/plan.cuh"
#include "kernels/roles.h"
#include "layout/cluster_share.h"

namespace megamoe {

// One unit of GEMM work: a row tile of one expert's projection times one chunk of its tokens.
struct Unit {
  int down;  // 0: gate/up, 1: down
  int expert;
  int tile;
  int chunk;       // global chunk number, names the activation counter
  int row_base;    // first row of the chunk
  int rows;        // tokens in the chunk; none: nothing to do for this CTA of the cluster
  int only_chunk;  // of the expert: nobody else reads the weights
  // With the cluster's other CTA, which has another chunk, or another tile.
  int shares_weights;
  int shares_tokens;
};

// All gate/up units, then all down units; inside each expert by expert, tile by tile, chunk by chunk: chunks that share
// weights are neighbours, so that only the first of them reads device memory. In the normal orientation the down units of the last
// experts go tile by tile over all these experts, so that columns are complete one after the other and are summed meanwhile; not so
// where that would be most of them, which would wait for the last gate/up units. In swapAB the chunk with the fewest tokens has the last
// down units: nothing else is left to do by then, and they take the less time the fewer tokens they have. A ticket is a unit, or
// one for each CTA of a cluster.
template <typename Orientation>
class UnitSchedule {
 public:
  __device__ UnitSchedule(const MoeArguments& args, const Plan& plan)
      : constants_(args.constants), cluster_(args), plan_(plan), first_tail_chunk_(num_chunks()) {
    if (Orientation::kSwapsOperands || cluster_.has_partner())
      return;  // two CTAs share an expert's chunks in an order of their own
    const int chunks = ceil_div(kTailUnitsPerCta * static_cast<int>(gridDim.x), constants_.down_tickets.value());
    if (2 * chunks > num_chunks()) return;
    first_tail_chunk_ = plan_.chunk_base(expert_of_chunk(num_chunks() - chunks));
  }

  __device__ int num_chunks() const { return plan_.num_chunks(); }
  __device__ uint32_t num_gate_up() const {
    return static_cast<uint32_t>(num_chunks()) * constants_.gate_up_tickets.value();
  }
  __device__ uint32_t size() const {
    return static_cast<uint32_t>(num_chunks()) * (constants_.gate_up_tickets.value() + constants_.down_tickets.value());
  }

  // Of CTA `rank` of a cluster.
  __device__ Unit unit(uint32_t ticket, int rank) const {
    Unit u;
    const uint32_t first_down = num_gate_up();
    u.down = ticket >= first_down;
    int index = ticket - (u.down ? first_down : 0);
    const Divisor& tickets = u.down ? constants_.down_tickets : constants_.gate_up_tickets;
    int chunk = tickets.divide(index);
    if (Orientation::kSwapsOperands && u.down) {
      const int place = chunk, smallest = plan_.smallest_chunk();
      if (place >= smallest) chunk = place == num_chunks() - 1 ? smallest : place + 1;
      index += (chunk - place) * static_cast<int>(tickets.value());
    }
    const bool tail = !Orientation::kSwapsOperands && u.down && chunk >= first_tail_chunk_;
    u.expert = expert_of_chunk(chunk);
    // The chunks that take turns.
    const int first = tail ? first_tail_chunk_ : plan_.chunk_base(u.expert);
    const int chunks = (tail ? num_chunks() : plan_.chunk_base(u.expert + 1)) - first;
    const int within = index - first * static_cast<int>(tickets.value());
    const int group = chunks == 1 ? within : within / chunks;
    int member = within - group * chunks;
    if (tail) {
      u.expert = expert_of_chunk(first + member);
      member += first - plan_.chunk_base(u.expert);
    }
    const int first_chunk = plan_.chunk_base(u.expert);
    const int count = plan_.count(plan_.first_expert() + u.expert);
    ClusterShare share{group, member};
    if (cluster_.has_partner()) {
      const Divisor& tiles = u.down ? constants_.down_units : constants_.gate_up_units;
      share = cluster_share(count, tiles.value(), group, member, rank);
    }
    u.tile = share.tile;
    u.only_chunk = plan_.chunk_base(u.expert + 1) - first_chunk == 1;
    u.chunk = first_chunk + share.chunk;
    u.row_base = plan_.row_base(plan_.first_expert() + u.expert) + share.chunk * kTile;
    u.rows = share.idle ? 0 : min(kTile, count - share.chunk * kTile);
    u.shares_weights = share.shares_weights;
    u.shares_tokens = share.shares_tokens;
    return u;
  }

 private:
  static constexpr int kTile = Orientation::kTokenTile;
  static constexpr int kTailUnitsPerCta = 2;

  // The last expert whose first chunk is not after `chunk`; experts without tokens share their successor's first chunk.
  __device__ int expert_of_chunk(int chunk) const {
    int low = 0, high = plan_.num_experts() - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (plan_.chunk_base(middle) <= chunk) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  const LaunchConstants& constants_;
  Cluster<Orientation> cluster_;
  Plan plan_;
  int first_tail_chunk_;  // from which on chunks take turns
};

}  // namespace megamoe
