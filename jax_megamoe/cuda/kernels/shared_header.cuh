// The fixed part of a CTA's shared memory: barriers, and the small notes that warps leave each other.
#pragma once

#include <cstdint>

#include "kernels/roles.h"
#include "layout/workspace.h"

namespace megamoe {

// Told by the weight producer in the first stage of every unit.
struct UnitNote {
  int tile;  // negative: no more units
  int chunk;
  int row_base;
  int rows_and_flags;

  static constexpr int kEnd = -1;

  __device__ bool end() const { return tile < 0; }
  __device__ bool down() const { return (rows_and_flags & 1) != 0; }
  __device__ bool shares_tokens() const { return (rows_and_flags & 2) != 0; }
  __device__ int rows() const { return rows_and_flags >> 2; }
  __device__ int padded_rows() const { return round_up(rows(), 8); }
};

// Counters that wait to be advanced: written by a consumer warpgroup, read by its signal thread.
struct SignalQueue {
  uint64_t full[kSignalSlots];
  uint64_t empty[kSignalSlots];
  uint32_t* counter[kSignalSlots];
};

// Fixed part of shared memory.
struct SharedHeader {
  uint64_t weights_full[kMaxStages];  // the stage's weights have landed
  uint64_t tokens_full[kMaxStages];   // ... its tokens
  uint64_t empty[kMaxStages];         // every consumer warp has finished with the stage
  uint64_t planned;                   // the plan is complete
  uint64_t gathered;             // this CTA's and its partner's shares of the tokens, through the stages' token parts
  uint64_t claimed[kMaxStages];  // the weight producer has taken the stage; the token producer may fill its part
  SignalQueue signals[kConsumerWarpgroups];
  uint64_t ticket_told[kTicketSlots];  // of a pair of CTAs
  uint32_t ticket[kTicketSlots];
  uint32_t ids_missing;  // in a group: some did not come in time, to this CTA or to the other one of its pair
  uint32_t launch;       // its number at this call site
  uint64_t epoch;        // ... and in the group, if there is one
  alignas(16) float weight_scale[kMaxStages][2 * kScaleVectorFloats];  // destinations of bulk copies
  alignas(16) UnitNote note[kMaxStages];
};

constexpr int kSharedHeaderBytes = sizeof(SharedHeader);

// The dynamic shared memory of the CTA. A function rather than a pointer that is passed around: its address is a constant.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

__device__ __forceinline__ SharedHeader& shared_header() { return *reinterpret_cast<SharedHeader*>(shared_memory()); }

}  // namespace megamoe
