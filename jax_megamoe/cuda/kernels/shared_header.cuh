// The fixed part of a CTA's shared memory: barriers, and the small notes that warps leave each other.
#pragma once

#include <cstdint>

#include "kernels/roles.h"
#include "layout/peer_buffer.h"

namespace megamoe {

// Written by the weight producer in the first stage of every unit, for the token producer and the consumers.
// What it says of the unit is explained at Unit (kernels/schedule.cuh).
struct UnitNote {
  int tile;  // negative: no more units
  int chunk;
  int row_base;
  int packed;  // rows << kRowsShift | shares_tokens << kSharesTokensShift | down

  // `down` and `shares_tokens`: 0 or 1.
  __device__ static UnitNote make(int tile, int chunk, int row_base, int rows, int down, int shares_tokens) {
    return {tile, chunk, row_base, rows << kRowsShift | shares_tokens << kSharesTokensShift | down};
  }
  // Of a stage's note: there are no more units. The rest of the note is not read.
  __device__ void set_end() { tile = -1; }

  __device__ bool end() const { return tile < 0; }
  __device__ bool down() const { return (packed & 1) != 0; }
  __device__ bool shares_tokens() const { return (packed & 1 << kSharesTokensShift) != 0; }
  __device__ int rows() const { return packed >> kRowsShift; }
  __device__ int padded_rows() const { return round_up(rows(), 8); }

 private:
  static constexpr int kSharesTokensShift = 1, kRowsShift = 2;
};

// Counters that wait to be advanced: written by a consumer warpgroup, read by its signal thread.
struct SignalQueue {
  uint64_t full[kSignalSlots];
  uint64_t empty[kSignalSlots];
  uint32_t* counter[kSignalSlots];
};

// What the weight producer knows of the first units of CTAs that have not started (kernels/tickets.cuh).
struct VacantUnits {
  alignas(16) ControlHead control;  // as it was when the last ticket was drawn
  uint32_t places_tried;            // places that need no second look
  uint32_t deferred_ticket;         // drawn, and kept until a vacant unit is done
};

// Where a warpgroup decodes weights: the ring of what it decodes, and notes of units for the token producer, which
// fills stages of the consumers' ring.
struct CodeRing {
  uint64_t full[kCodeStages];
  uint64_t empty[kCodeStages];
  uint64_t note_full[kUnitNotes];
  uint64_t note_empty[kUnitNotes];
  alignas(16) UnitNote note[kCodeStages];
  uint32_t shared[kCodeStages];  // with the cluster's other CTA: each decodes a tile for both
  alignas(16) UnitNote unit_note[kUnitNotes];
};

// Fixed part of shared memory.
struct SharedHeader {
  uint64_t weights_full[kMaxStages];  // the stage's weights have landed
  uint64_t tokens_full[kMaxStages];   // ... its tokens
  uint64_t empty[kMaxStages];         // every consumer warp has finished with the stage
  uint64_t planned;                   // the plan is complete
  uint64_t dispatched;                // this CTA and its partner need the stages' token parts no more for dispatch
  uint64_t vacant_shares_wanted;      // of the tokens: those of CTAs that have not started
  uint64_t vacant_shares_done;        // ... are dispatched
  uint64_t claimed[kMaxStages];       // the weight producer has taken the stage; the token producer may fill its part
  SignalQueue signals[kConsumerWarpgroups];
  int kept[kConsumerWarpgroups];  // no register for it. Normal: the unit's chunk; halves: signals posted so far
  uint64_t ticket_published[kTicketSlots];  // from the cluster's first CTA to the other
  uint32_t ticket[kTicketSlots];
  int num_chunks, max_rows, smallest_chunk;  // of the plan (kernels/plan.cuh)
  int plan_end;
  uint32_t ids_missing;     // in a group: some did not come in time, to this CTA or to its partner
  uint32_t launch;          // its number at this call site
  uint32_t has_share;       // of the tokens, or somebody has taken it over
  uint32_t has_unit;        // ... the first one of this CTA
  uint32_t tokens_missing;  // in a group: some tokens, or ids, did not come; nothing made of them goes to other ranks
  uint32_t group_failed;    // in a group: a warp of this CTA has seen that a wait has failed, in whichever launch
  VacantUnits vacant_units;
  // In a group: the launch's number there, how long to wait for other ranks, and their memory (PeerView).
  uint64_t epoch;
  uint64_t timeout_nanoseconds;
  uint64_t ids_bytes;
  uint8_t* workspace[kMaxRanks];
  uint8_t* own_workspace;
  union {
    alignas(16) float weight_scale[kMaxStages][2 * kScaleVectorFloats];  // destinations of bulk copies
    CodeRing codes;                                                      // of weights that have none
  };
  alignas(16) UnitNote note[kMaxStages];
};

constexpr int kSharedHeaderBytes = sizeof(SharedHeader);

// The dynamic shared memory of the CTA. A function rather than a pointer that is passed around: its address is a
// constant.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

__device__ __forceinline__ SharedHeader& shared_header() { return *reinterpret_cast<SharedHeader*>(shared_memory()); }

}  // namespace megamoe
