// The routing plan: how many tokens each expert has, where their gathered rows lie, and the list of GEMM units.
// Every CTA computes the same plan from the ids, so no CTA waits for another one before it streams weights.
#pragma once

#include <cstdint>

#include "kernels/arguments.h"
#include "kernels/roles.h"
#include "kernels/shared_header.cuh"

namespace megamoe {

// One unit of GEMM work: a row tile of one expert's projection times one chunk of its tokens.
struct Unit {
  int down;  // 0: gate/up, 1: down
  int expert;
  int tile;
  int chunk;     // global chunk number, names the activation counter
  int row_base;  // first gathered row of the chunk
  int rows;      // tokens in the chunk
  bool alone;    // the expert has no other chunk
};

// The dynamic shared memory of the CTA. A function rather than a pointer that is passed around: its address is a constant.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

// Arrays of `num_experts` (+1) entries that follow each other in shared memory, behind the fixed header.
class Plan {
 public:
  __device__ explicit Plan(int num_experts) : num_experts_(num_experts) {}

  __host__ __device__ static int bytes(int num_experts) {
    return (4 * num_experts + 2) * static_cast<int>(sizeof(int));
  }

  __device__ int num_experts() const { return num_experts_; }
  // Pairs per expert.
  __device__ int& count(int expert) const { return storage()[expert]; }
  // First gathered row.
  __device__ int& row_base(int expert) const { return storage()[num_experts_ + expert]; }
  // Pairs of earlier CTAs' tokens, then a running position.
  __device__ int& before(int expert) const { return storage()[2 * num_experts_ + expert]; }
  // First chunk; one past the last expert: the number of chunks.
  __device__ int& chunk_base(int expert) const { return storage()[3 * num_experts_ + expert]; }
  __device__ int num_chunks() const { return chunk_base(num_experts_); }
  // Rows of the largest padded chunk.
  __device__ int& max_rows() const { return storage()[4 * num_experts_ + 1]; }

 private:
  __device__ static int* storage() { return reinterpret_cast<int*>(shared_memory() + kSharedHeaderBytes); }

  int num_experts_;
};

// Counts pairs per expert, in all and before `first_pair`. All threads of the CTA; `expert` is the id of the thread's first
// pair, which it asked for beforehand. Begins and ends with a CTA barrier.
template <bool kSwap>
__device__ __forceinline__ void count_pairs(const MoeArguments& args, const Plan& plan, int first_pair, int expert) {
  const int num_experts = args.problem.num_experts;
  const int num_pairs = args.problem.num_pairs();
#pragma unroll 1
  for (int e = threadIdx.x; e < num_experts; e += kCtaThreads) plan.count(e) = plan.before(e) = 0;
  __syncthreads();
  constexpr int kIdsInFlight = Orientation<kSwap>::kIdsInFlight;
#pragma unroll 1
  for (int first = threadIdx.x; first < num_pairs; first += kIdsInFlight * kCtaThreads) {
    int experts[kIdsInFlight];
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i) {
      const int pair = first + i * kCtaThreads;
      experts[i] = pair == threadIdx.x ? expert : pair < num_pairs ? __ldg(args.topk_ids + pair) : -1;
    }
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i) {
      if (experts[i] < 0 || experts[i] >= num_experts) continue;
      atomicAdd(&plan.count(experts[i]), 1);
      if (first + i * kCtaThreads < first_pair) atomicAdd(&plan.before(experts[i]), 1);
    }
  }
  __syncthreads();
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

// Prefix sums over the experts. One warp.
template <bool kSwap>
__device__ __forceinline__ void lay_out_chunks(const Plan& plan) {
  const int num_experts = plan.num_experts();
  constexpr int kTile = Orientation<kSwap>::kTokenTile;
  const int lane = threadIdx.x % 32;
  int rows_so_far = 0, chunks_so_far = 0, max_rows = 8;
  for (int first = 0; first < num_experts; first += 32) {
    const int e = first + lane;
    const int count = e < num_experts ? plan.count(e) : 0;
    const int rows = round_up(count, 8);
    const int chunks = ceil_div(count, kTile);
    const int rows_end = warp_inclusive_sum(rows);
    const int chunks_end = warp_inclusive_sum(chunks);
    if (e < num_experts) {
      plan.row_base(e) = rows_so_far + rows_end - rows;
      plan.chunk_base(e) = chunks_so_far + chunks_end - chunks;
    }
    rows_so_far += __shfl_sync(~0u, rows_end, 31);
    chunks_so_far += __shfl_sync(~0u, chunks_end, 31);
    max_rows = max(max_rows, __reduce_max_sync(~0u, min(rows, kTile)));
  }
  if (lane == 0) {
    plan.chunk_base(num_experts) = chunks_so_far;
    plan.max_rows() = max_rows;
  }
}

// All gate/up units, then all down units; inside each expert by expert, tile by tile, chunk by chunk: chunks that share
// weights are neighbours, so that only the first of them reads device memory.
template <bool kSwap>
class UnitSchedule {
 public:
  __device__ UnitSchedule(const MoeArguments& args, const Plan& plan)
      : plan_(plan),
        gate_up_units_(args.constants.gate_up_units),
        down_units_(args.constants.down_units),
        num_chunks_(plan.num_chunks()) {}

  __device__ int num_chunks() const { return num_chunks_; }
  __device__ uint32_t num_gate_up() const { return static_cast<uint32_t>(num_chunks_) * gate_up_units_.value(); }
  __device__ uint32_t size() const {
    return static_cast<uint32_t>(num_chunks_) * (gate_up_units_.value() + down_units_.value());
  }

  __device__ Unit unit(uint32_t ticket) const {
    Unit u;
    const uint32_t first_down = num_gate_up();
    u.down = ticket >= first_down;
    const int index = ticket - (u.down ? first_down : 0);
    const Divisor& units = u.down ? down_units_ : gate_up_units_;
    u.expert = expert_of_chunk(units.divide(index));
    const int first_chunk = plan_.chunk_base(u.expert);
    const int chunks = plan_.chunk_base(u.expert + 1) - first_chunk;
    const int within = index - first_chunk * static_cast<int>(units.value());
    u.tile = chunks == 1 ? within : within / chunks;
    const int chunk = within - u.tile * chunks;
    u.chunk = first_chunk + chunk;
    u.alone = chunks == 1;
    u.row_base = plan_.row_base(u.expert) + chunk * kTile;
    u.rows = min(kTile, plan_.count(u.expert) - chunk * kTile);
    return u;
  }

 private:
  static constexpr int kTile = Orientation<kSwap>::kTokenTile;

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

  Plan plan_;
  const Divisor& gate_up_units_;
  const Divisor& down_units_;
  int num_chunks_;
};

}  // namespace megamoe
