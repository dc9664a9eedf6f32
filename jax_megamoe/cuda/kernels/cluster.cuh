// Two CTAs, a cluster, that take the same tickets and go through the same stages, each with a chunk of its own of one
// expert: one brings half of the weights' bytes to both, the other one the other half. Where an expert has no two full
// chunks left, each has a tile of its own of the same chunk, and brings its weights alone and half of the tokens.
// Shared weights that have to be decoded are decoded by the CTA that brings them, which copies them to the other.
//
// What the two must agree on: a stage is free when the consumers of both have left it; the CTA of rank 0 draws the
// tickets and publishes them to its partner; neither ends before the partner's last arrival is here
// (WeightProducer::await_last_releases).
// Waits for the other CTA need no limit: the two start together, and whatever else they wait for has one.
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/mbarrier.cuh"
#include "kernels/arguments.h"
#include "kernels/roles.h"
#include "kernels/shared_header.cuh"

namespace megamoe {

constexpr uint16_t kBothCtas = 3;  // a bit for each rank in the cluster

// The CTA's place in its cluster, of two CTAs or of one. swapAB is bound by the memory and has one chunk per expert:
// its CTAs are alone, and the compiler knows.
template <typename Orientation>
class Cluster {
 public:
  __device__ explicit Cluster(const MoeArguments& args) : ctas_(args.constants.cluster_ctas) {}

  __device__ bool has_partner() const { return !Orientation::kSwapsOperands && ctas_ == 2; }
  __device__ uint32_t ctas() const { return Orientation::kSwapsOperands ? 1 : ctas_; }
  __device__ uint32_t rank() const { return has_partner() ? ptx::cluster_rank() : 0; }
  // Of the grid's clusters.
  __device__ uint32_t index() const { return blockIdx.x / ctas(); }
  __device__ uint32_t count() const { return gridDim.x / ctas(); }

  // All threads; between the two, the barriers of both CTAs' shared memory come to exist. A CTA that is alone is a
  // cluster too.
  __device__ static void announce_barriers() {
    if constexpr (!Orientation::kSwapsOperands) ptx::cluster_arrive_relaxed();
  }
  __device__ static void await_barriers() {
    if constexpr (!Orientation::kSwapsOperands) ptx::cluster_wait();
  }

  // All threads of a CTA of a group, once it has counted. Where a rank is late or has failed, some CTAs may have its
  // ids and others not. The two of a cluster would make different plans and wait for each other's stages: then both
  // have no units.
  __device__ __forceinline__ void agree_on_missing_ids(SharedHeader& header) const {
    if (!has_partner()) return;
    if (threadIdx.x == 0 && header.ids_missing != 0) ptx::store_in_cluster(&header.ids_missing, 1, rank() ^ 1);
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }

  // One thread of rank 0 publishes the ticket of the unit number `unit`; the weight producer of rank 1 waits for it.
  __device__ __forceinline__ void publish_ticket(SharedHeader& header, uint32_t unit, uint32_t ticket) const {
    const uint32_t slot = unit % kTicketSlots;
    ptx::store_in_cluster(&header.ticket[slot], ticket, &header.ticket_published[slot], 1);
  }
  __device__ __forceinline__ uint32_t await_ticket(SharedHeader& header, uint32_t unit) const {
    const uint32_t slot = unit % kTicketSlots;
    ptx::mbarrier_arrive_expect_tx(&header.ticket_published[slot], sizeof(uint32_t));
    await(&header.ticket_published[slot], unit / kTicketSlots % 2);
    return header.ticket[slot];
  }

 private:
  int ctas_;
};

}  // namespace megamoe
