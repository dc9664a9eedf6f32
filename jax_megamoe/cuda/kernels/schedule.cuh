// The list of GEMM units: which unit a ticket is.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "kernels/arguments.h"
#include "kernels/cluster.cuh"
#include "kernels/plan.cuh"
#include "kernels/roles.h"
#include "layout/cluster_share.h"
#include "layout/unit_order.h"

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

// All gate/up units, then all down units, or both in turns, in the order of layout/unit_order.h. The tail are the last
// two rounds of down units in the normal orientation; there is none where that would be more than half of all down
// units, which would then all wait for the last gate/up unit. A ticket is a unit, or one for each CTA of a cluster.
template <typename Orientation>
class UnitSchedule {
 public:
  __device__ UnitSchedule(const MoeArguments& args, const Plan& plan)
      : constants_(args.constants), cluster_(args), plan_(plan), first_tail_chunk_(num_chunks()) {
    if (Orientation::kSwapsOperands || cluster_.has_partner() || takes_turns())
      return;  // two CTAs share an expert's chunks in an order of their own, and so do runs
    const int chunks = ceil_div(kTailUnitsPerCta * static_cast<int>(gridDim.x), constants_.down_tickets.value());
    if (2 * chunks > num_chunks()) return;
    first_tail_chunk_ = plan_.chunk_base(expert_of_chunk(plan_, num_chunks() - chunks));
  }

  __device__ int num_chunks() const { return plan_.num_chunks(); }
  __device__ uint32_t num_gate_up() const {
    return static_cast<uint32_t>(num_chunks()) * constants_.gate_up_tickets.value();
  }
  // Tickets below it wait for no other unit. Gate/up units do where images go through a ring, and its first round is
  // over; a ticket may be for any chunk of its run. The first down unit comes after that, since the ring has no more
  // images than gate/up units are chunks ahead.
  __device__ uint32_t independent_end() const {
    const int slots = constants_.image_slots.value();
    if (takes_turns() && num_chunks() > slots) {
      return static_cast<uint32_t>(slots - kRunChunks) * constants_.gate_up_tickets.value();
    }
    return num_gate_up();
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
    if constexpr (Orientation::kMayAssembleImages) {
      if (takes_turns()) {
        const ProjectionTicket one = in_turns(ticket, num_chunks(), constants_.turns);
        u.down = one.down;
        index = one.index;
      }
    }
    const Divisor& tickets = u.down ? constants_.down_tickets : constants_.gate_up_tickets;
    TicketPlace place = ticket_place<Orientation::kSwapsOperands>(plan_, u.down, index, tickets, first_tail_chunk_);
    u.expert = place.expert;
    const int first_chunk = plan_.chunk_base(u.expert);
    int count = plan_.count(plan_.first_expert() + u.expert);
    int run = 0;  // the first chunk of the unit's run, which is from here on like an expert
    if constexpr (Orientation::kMayAssembleImages) {
      if (takes_turns()) {
        const int num_chunks = plan_.chunk_base(u.expert + 1) - first_chunk;
        const int run_chunks = u.down ? kDownRunChunks : kRunChunks;
        place = place_in_run(place, num_chunks, tickets.value(), run_chunks, &run);
        count = min(count - run * kTile, run_chunks * kTile);
      }
    }
    ClusterShare share{place.group, place.member};
    if (cluster_.has_partner()) {
      const Divisor& tiles = u.down ? constants_.down_units : constants_.gate_up_units;
      share = cluster_share(count, tiles.value(), place.group, place.member, rank);
    }
    u.tile = share.tile;
    u.only_chunk = plan_.chunk_base(u.expert + 1) - first_chunk == 1;
    u.chunk = first_chunk + run + share.chunk;
    u.row_base = plan_.row_base(plan_.first_expert() + u.expert) + (run + share.chunk) * kTile;
    u.rows = share.idle ? 0 : min(kTile, count - share.chunk * kTile);
    u.shares_weights = share.shares_weights;
    u.shares_tokens = share.shares_tokens;
    return u;
  }

 private:
  static constexpr int kTile = Orientation::kTokenTile;

  // Where images go through rings. Code for it is behind an `if constexpr`, too: else ptxas spills in other kernels.
  __device__ bool takes_turns() const { return Orientation::kMayAssembleImages && constants_.assembles_images; }

  const LaunchConstants& constants_;
  Cluster<Orientation> cluster_;
  Plan plan_;
  int first_tail_chunk_;  // from which on chunks take turns
};

}  // namespace megamoe
