// The routing plan: how many tokens each expert has, and where their rows lie in the images.
// Every CTA computes the same plan from the ids, so no CTA waits for another one before it streams weights.
#pragma once

#include <cstdint>

#include "common/ptx/memory_order.cuh"
#include "common/ptx/warp.cuh"
#include "kernels/arguments.h"
#include "kernels/group.cuh"
#include "kernels/prefetch.cuh"
#include "kernels/roles.h"
#include "kernels/shared_header.cuh"

namespace megamoe {

// Arrays that follow each other in shared memory, behind the fixed header: of all experts of the group, and of this
// rank's.
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

// Counts the group's routes per expert, in all and before `first_route`. All threads of the CTA; with one rank `expert`
// is the id of the thread's first route, loaded before. Begins and ends with a CTA barrier.
template <typename Orientation, typename Group>
__device__ __forceinline__ void count_routes(const MoeArguments& args, const Plan& plan, int first_route, int expert) {
#pragma unroll 1
  for (int e = threadIdx.x; e < plan.group_experts(); e += Orientation::kThreads) plan.count(e) = plan.before(e) = 0;
  __syncthreads();
  constexpr int kIdsInFlight = Orientation::kIdsInFlight;
  if constexpr (Group::kHasPeers) {
    const int num_routes = args.problem.group_routes();
    const uint64_t epoch = shared_header().epoch;
    const uint64_t* ids = Group::words(epoch);
    constexpr int kWordsInFlight = 8;  // there are more of them than of one rank
#pragma unroll 1
    for (int first = threadIdx.x; first < num_routes; first += kWordsInFlight * Orientation::kThreads) {
      uint64_t words[kWordsInFlight];
      bool all_there = false;
      for (int tries = 0; !all_there && tries < Group::kQuickTries; ++tries) {
#pragma unroll
        for (int i = 0; i < kWordsInFlight; ++i) {
          const int route = first + i * Orientation::kThreads;
          words[i] = route < num_routes ? ptx::load_relaxed_system(ids + route) : 0;
        }
        all_there = true;
#pragma unroll
        for (int i = 0; i < kWordsInFlight; ++i) {
          if (first + i * Orientation::kThreads < num_routes)
            all_there = all_there && Group::is_there(args, epoch, words[i]);
        }
      }
      if (all_there) {
#pragma unroll
        for (int i = 0; i < kWordsInFlight; ++i) {
          const int route = first + i * Orientation::kThreads;
          if (route < num_routes) count_route(plan, Group::id_of_word(words[i]), route < first_route);
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < kWordsInFlight; ++i) {
          const int route = first + i * Orientation::kThreads;
          if (route < num_routes) count_route(plan, Group::await_id(args, epoch, route), route < first_route);
        }
      }
    }
  } else {
    const int num_routes = args.problem.num_routes();
#pragma unroll 1
    for (int first = threadIdx.x; first < num_routes; first += kIdsInFlight * Orientation::kThreads) {
      int experts[kIdsInFlight];
#pragma unroll
      for (int i = 0; i < kIdsInFlight; ++i) {
        const int route = first + i * Orientation::kThreads;
        experts[i] = route == threadIdx.x ? expert : route < num_routes ? __ldg(args.topk_ids + route) : -1;
      }
#pragma unroll
      for (int i = 0; i < kIdsInFlight; ++i)
        count_route(plan, experts[i], first + i * Orientation::kThreads < first_route);
    }
  }
  __syncthreads();
}

// Counts the routes before `first_route` anew, of the tokens of a CTA whose place is taken over. All consumers.
template <typename Group>
__device__ __forceinline__ void recount_before(const MoeArguments& args, const Plan& plan, int first_route) {
  // Downwards: otherwise ptxas keeps the question whether there is an expert from the first count on, and spills.
#pragma unroll 1
  for (int e = plan.group_experts() - 1 - static_cast<int>(threadIdx.x); e >= 0; e -= kConsumerThreads) {
    plan.before(e) = 0;
  }
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
        prefetch_first_unit<Orientation>(args, e, first_chunk, chunks);
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

}  // namespace megamoe
