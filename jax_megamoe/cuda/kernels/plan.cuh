// The routing plan: how many tokens each expert has, where their rows lie in the images, and the list of GEMM units.
// Every CTA computes the same plan from the ids, so no CTA waits for another one before it streams weights.
#pragma once

#include <cstdint>

#include "common/ptx/memory_order.cuh"
#include "common/ptx/warp.cuh"
#include "kernels/arguments.h"
#include "kernels/cluster.cuh"
#include "kernels/group.cuh"
#include "kernels/prefetch.cuh"
#include "kernels/roles.h"
#include "kernels/shared_header.cuh"
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

// Arrays that follow each other in shared memory, behind the fixed header: of all experts of the group, and of this rank's.
class Plan {
 public:
  __host__ __device__ Plan(int num_experts, int num_ranks, int rank)
      : group_experts_(num_ranks * num_experts), num_experts_(num_experts), first_expert_(rank * num_experts) {}

  __host__ __device__ int bytes() const {
    return (3 * group_experts_ + num_experts_ + 1) * static_cast<int>(sizeof(int));
  }

  // Where what follows in shared memory begins.
  __host__ __device__ int end() const { return round_up(kSharedHeaderBytes + bytes(), 16); }

  __device__ int group_experts() const { return group_experts_; }
  __device__ int num_experts() const { return num_experts_; }    // of this rank
  __device__ int first_expert() const { return first_expert_; }  // of this rank, in the group
  // Arrays by expert of the group: how many routes it has.
  __device__ int& count(int expert) const { return storage()[expert]; }
  // First row of the expert's images, on its rank.
  __device__ int& row_base(int expert) const { return storage()[group_experts_ + expert]; }
  // Routes of earlier CTAs' tokens, then a running position.
  __device__ int& before(int expert) const { return storage()[2 * group_experts_ + expert]; }
  // First chunk, by expert of this rank; one past the last: the number of chunks.
  __device__ int& chunk_base(int expert) const { return storage()[3 * group_experts_ + expert]; }
  // What it amounts to lies in the header, whose addresses are constants.
  __device__ static int& num_chunks() { return shared_header().num_chunks; }
  // Rows of the largest padded chunk.
  __device__ static int& max_rows() { return shared_header().max_rows; }
  // swapAB: the chunk with the fewest tokens, of an expert that has no other one; beyond all where there is none.
  __device__ static int& smallest_chunk() { return shared_header().smallest_chunk; }

 private:
  __device__ static int* storage() { return reinterpret_cast<int*>(shared_memory() + kSharedHeaderBytes); }

  int group_experts_;
  int num_experts_;
  int first_expert_;
};

__device__ __forceinline__ void count_route(const Plan& plan, int expert, bool before) {
  if (expert < 0 || expert >= plan.group_experts()) return;
  atomicAdd(&plan.count(expert), 1);
  if (before) atomicAdd(&plan.before(expert), 1);
}

// Counts the group's routes per expert, in all and before `first_route`. All threads of the CTA; with one rank `expert` is
// the id of the thread's first route, loaded before. Begins and ends with a CTA barrier.
template <typename Orientation, typename Group>
__device__ __forceinline__ void count_routes(const MoeArguments& args, const Plan& plan, int first_route, int expert) {
#pragma unroll 1
  for (int e = threadIdx.x; e < plan.group_experts(); e += kCtaThreads) plan.count(e) = plan.before(e) = 0;
  __syncthreads();
  constexpr int kIdsInFlight = Orientation::kIdsInFlight;
  if constexpr (Group::kHasPeers) {
    const int num_routes = args.problem.group_routes();
    const uint64_t epoch = shared_header().epoch;
    const uint64_t* ids = Group::words(epoch);
    constexpr int kWordsInFlight = 8;  // there are more of them than of one rank
#pragma unroll 1
    for (int first = threadIdx.x; first < num_routes; first += kWordsInFlight * kCtaThreads) {
      uint64_t words[kWordsInFlight];
      bool all_there = false;
      for (int tries = 0; !all_there && tries < Group::kQuickTries; ++tries) {
#pragma unroll
        for (int i = 0; i < kWordsInFlight; ++i) {
          const int route = first + i * kCtaThreads;
          words[i] = route < num_routes ? ptx::load_relaxed_system(ids + route) : 0;
        }
        all_there = true;
#pragma unroll
        for (int i = 0; i < kWordsInFlight; ++i) {
          if (first + i * kCtaThreads < num_routes) all_there = all_there && Group::is_there(args, epoch, words[i]);
        }
      }
      if (all_there) {
#pragma unroll
        for (int i = 0; i < kWordsInFlight; ++i) {
          const int route = first + i * kCtaThreads;
          if (route < num_routes) count_route(plan, Group::id_of_word(words[i]), route < first_route);
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < kWordsInFlight; ++i) {
          const int route = first + i * kCtaThreads;
          if (route < num_routes) count_route(plan, Group::await_id(args, epoch, route), route < first_route);
        }
      }
    }
  } else {
    const int num_routes = args.problem.num_routes();
#pragma unroll 1
    for (int first = threadIdx.x; first < num_routes; first += kIdsInFlight * kCtaThreads) {
      int experts[kIdsInFlight];
#pragma unroll
      for (int i = 0; i < kIdsInFlight; ++i) {
        const int route = first + i * kCtaThreads;
        experts[i] = route == threadIdx.x ? expert : route < num_routes ? __ldg(args.topk_ids + route) : -1;
      }
#pragma unroll
      for (int i = 0; i < kIdsInFlight; ++i) count_route(plan, experts[i], first + i * kCtaThreads < first_route);
    }
  }
  __syncthreads();
}

// Counts the routes before `first_route` anew, of the tokens of a CTA whose place is taken over. All consumers.
template <typename Group>
__device__ __forceinline__ void recount_before(const MoeArguments& args, const Plan& plan, int first_route) {
#pragma unroll 1
  for (int e = threadIdx.x; e < plan.group_experts(); e += kConsumerThreads) plan.before(e) = 0;
  ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
#pragma unroll 1
  for (int route = threadIdx.x; route < first_route; route += kConsumerThreads) {
    const int expert = Group::id_of_route(args, route);
    if (expert >= 0 && expert < plan.group_experts()) atomicAdd(&plan.before(expert), 1);
  }
  ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
}

__device__ __forceinline__ int warp_inclusive_sum(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(~0u, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}

// Prefix sums over the experts of a rank, this one's if `kOwn`: then chunks too. One warp.
template <typename Orientation, bool kOwn = true>
__device__ __forceinline__ void lay_out_chunks(const MoeArguments& args, const Plan& plan, int first_expert) {
  const int num_experts = plan.num_experts();
  constexpr int kTile = Orientation::kTokenTile, kChunkBits = 24;
  const int lane = threadIdx.x % 32;
  int rows_so_far = 0, chunks_so_far = 0, max_rows = 8;
  uint32_t smallest = ~0u;  // tokens << kChunkBits | chunk
  for (int first = 0; first < num_experts; first += 32) {
    const int e = first + lane;
    const int count = e < num_experts ? plan.count(first_expert + e) : 0;
    const int rows = round_up(count, 8);
    const int rows_end = warp_inclusive_sum(rows);
    if (e < num_experts) plan.row_base(first_expert + e) = rows_so_far + rows_end - rows;
    rows_so_far += __shfl_sync(~0u, rows_end, 31);
    if constexpr (kOwn) {
      const int chunks = ceil_div(count, kTile);
      const int chunks_end = warp_inclusive_sum(chunks);
      const int first_chunk = chunks_so_far + chunks_end - chunks;
      if (e < num_experts) plan.chunk_base(e) = first_chunk;
      if constexpr (Orientation::kSwapsOperands) {
        prefetch_first_unit(args, e, first_chunk, chunks);
        if (chunks == 1) smallest = min(smallest, static_cast<uint32_t>(count) << kChunkBits | first_chunk);
      }
      chunks_so_far += __shfl_sync(~0u, chunks_end, 31);
      max_rows = max(max_rows, __reduce_max_sync(~0u, min(rows, kTile)));
    }
  }
  if constexpr (kOwn && Orientation::kSwapsOperands) smallest = __reduce_min_sync(~0u, smallest);
  if (kOwn && lane == 0) {
    plan.chunk_base(num_experts) = plan.num_chunks() = chunks_so_far;
    plan.max_rows() = max_rows;
    shared_header().plan_end = plan.end();
    plan.smallest_chunk() = smallest & ((1u << kChunkBits) - 1);
  }
}

// Where the rows of other ranks' experts lie. All consumers.
template <typename Orientation>
__device__ __forceinline__ void lay_out_other_ranks(const MoeArguments& args, const Plan& plan, int num_ranks) {
#pragma unroll 1
  for (int rank = threadIdx.x / 32; rank < num_ranks; rank += kConsumerWarps) {
    const int first_expert = rank * plan.num_experts();
    if (first_expert != plan.first_expert()) lay_out_chunks<Orientation, false>(args, plan, first_expert);
  }
  ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
}

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
