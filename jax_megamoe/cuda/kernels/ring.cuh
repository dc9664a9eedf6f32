// The ring of stages between the producers and the consumers: its barriers, and who arrives where.
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/mbarrier.cuh"
#include "kernels/cluster.cuh"
#include "kernels/roles.h"
#include "kernels/shared_header.cuh"

namespace megamoe {

// Position in the ring; every role walks the same sequence of stages.
struct StageCursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int num_stages) {
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Of the decoders, one for each warp, at a stage that they have decoded or filled.
constexpr int kDecoderArrivals = kEveryLaneArrives ? kDecoderWarps * 32 : kDecoderWarps;

// Where the weight producer's copies land: the consumers' ring, or one that is decoded into it.
template <typename Orientation>
struct LandingRing {
  __device__ static uint64_t* full(int stage) {
    return Orientation::kHasDecoders ? &shared_header().codes.full[stage] : &shared_header().weights_full[stage];
  }
  __device__ static uint64_t* empty(int stage) {
    return Orientation::kHasDecoders ? &shared_header().codes.empty[stage] : &shared_header().empty[stage];
  }
  __device__ static UnitNote& note(int stage) {
    return Orientation::kHasDecoders ? shared_header().codes.note[stage] : shared_header().note[stage];
  }
  __device__ static int stages(int num_stages) { return Orientation::kHasDecoders ? kCodeStages : num_stages; }
};

// One thread. (Several lanes side by side take 2 us longer: only a thread that is alone gets the fast kind of
// initialisation.) A stage is shared by `ctas` CTAs, whose consumers all leave it before it is free. Its tokens come by
// one thread's copies, or also by those of the warps that gather rows.
template <typename Orientation>
__device__ __forceinline__ void init_pipeline(SharedHeader& header, uint32_t ctas, bool gathers_rows) {
#pragma unroll
  for (int stage = 0; stage < kMaxStages; ++stage) {
    ptx::mbarrier_init(&header.weights_full[stage], Orientation::kHasDecoders ? kDecoderArrivals : 1);
    ptx::mbarrier_init(&header.tokens_full[stage], gathers_rows ? kRowWarps * 32 : 1);
    ptx::mbarrier_init(&header.empty[stage], ctas * (kEveryLaneArrives ? kConsumerThreads : kConsumerWarps));
    ptx::mbarrier_init(&header.claimed[stage], 1);
  }
  if constexpr (Orientation::kHasDecoders) {
#pragma unroll
    for (int stage = 0; stage < kCodeStages; ++stage) {
      ptx::mbarrier_init(&header.codes.full[stage], 1);
      ptx::mbarrier_init(&header.codes.empty[stage], kDecoderArrivals);
    }
#pragma unroll
    for (int note = 0; note < kUnitNotes; ++note) {
      ptx::mbarrier_init(&header.codes.note_full[note], 1);
      ptx::mbarrier_init(&header.codes.note_empty[note], 1);
    }
  }
#pragma unroll
  for (SignalQueue& queue : header.signals) {
#pragma unroll
    for (int slot = 0; slot < kSignalSlots; ++slot) {
      ptx::mbarrier_init(&queue.full[slot], 1);
      ptx::mbarrier_init(&queue.empty[slot], 1);
    }
  }
  if (ctas > 1) {
#pragma unroll
    for (uint64_t& published : header.ticket_published) ptx::mbarrier_init(&published, 1);
  }
  ptx::mbarrier_init(&header.planned, 32 + 1);  // the weight producer's warp, and who claims the CTA's place
  ptx::mbarrier_init(&header.dispatched, ctas * (kEveryLaneArrives ? kConsumerThreads : 1));
  ptx::mbarrier_init(&header.vacant_shares_wanted, 1);
  ptx::mbarrier_init(&header.vacant_shares_done, kEveryLaneArrives ? kConsumerThreads : 1);
  header.ids_missing = 0;
  header.vacant_units.places_tried = 0;
  ptx::mbarrier_init_fence();
}

__device__ __forceinline__ void wait_stage(SharedHeader& header, const StageCursor& cursor) {
  await(&header.weights_full[cursor.stage], cursor.parity);
  await(&header.tokens_full[cursor.stage], cursor.parity);
}

// The same in two parts: a test, whose result takes as long as some multiplies, and later the wait, if one is left. The
// wait begins with that result: a branch around it would make ptxas serialise the multiplies.
class StageQuery {
 public:
  __device__ __forceinline__ StageQuery(SharedHeader& header, const StageCursor& cursor)
      : weights_full_(&header.weights_full[cursor.stage]),
        tokens_full_(&header.tokens_full[cursor.stage]),
        parity_(cursor.parity),
        weights_landed_(ptx::mbarrier_test_wait(weights_full_, parity_)),
        tokens_landed_(ptx::mbarrier_test_wait(tokens_full_, parity_)) {}

  __device__ __forceinline__ void wait() const {
    await(weights_full_, parity_, weights_landed_);
    await(tokens_full_, parity_, tokens_landed_);
  }

  // The same with one branch instead of two.
  __device__ __forceinline__ void wait_at_once() const {
    bool landed = weights_landed_ && tokens_landed_;
    for (Tries tries = 0; !landed;) {
      if (++tries == kMostTries) fail();
      landed = ptx::mbarrier_try_wait(weights_full_, parity_) && ptx::mbarrier_try_wait(tokens_full_, parity_);
    }
  }

 private:
  uint64_t* weights_full_;
  uint64_t* tokens_full_;
  uint32_t parity_;
  bool weights_landed_;
  bool tokens_landed_;
};

// One arrival per consumer warp, in every CTA that shares the stage: the warp has no more use of it.
template <typename Orientation>
__device__ __forceinline__ void release_stage(const MoeArguments& args, SharedHeader& header, int stage) {
  __syncwarp();
  const uint32_t lane = threadIdx.x % 32;
  if constexpr (Orientation::kSwapsOperands) {
    if (kEveryLaneArrives || lane == 0) ptx::mbarrier_arrive(&header.empty[stage]);
  } else if constexpr (kEveryLaneArrives) {
    for (uint32_t rank = 0; rank < Cluster<Orientation>(args).ctas(); ++rank) {
      ptx::mbarrier_arrive_in_cluster(&header.empty[stage], rank);
    }
  } else {
    if (lane < Cluster<Orientation>(args).ctas()) ptx::mbarrier_arrive_in_cluster(&header.empty[stage], lane);
  }
}

}  // namespace megamoe
