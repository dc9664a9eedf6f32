// Which units a cluster works on, by their numbers in the schedule: the first is its own, the others it draws, so that
// a CTA that is slow for whatever reason takes fewer.
#pragma once

#include <cstdint>

#include "common/ptx/async_copy.cuh"
#include "common/ptx/clock.cuh"
#include "kernels/cluster.cuh"
#include "kernels/places.cuh"
#include "kernels/schedule.cuh"
#include "kernels/shared_map.cuh"

namespace megamoe {

// One thread of each CTA, the weight producer. The one of rank 0 in the cluster draws, and tells its partner. What is
// seldom needed is kept in shared memory (VacantUnits): the thread has no registers to spare.
template <typename Orientation>
class UnitTickets {
 public:
  __device__ UnitTickets(const MoeArguments& args, const Cluster<Orientation>& cluster,
                         const UnitSchedule<Orientation>& schedule)
      : args_(args), cluster_(cluster), schedule_(schedule), runnable_end_(schedule.independent_end()) {}

  static constexpr uint32_t kEnd = ~0u;  // there are no more

  // The ticket of unit number 0.
  __device__ __forceinline__ uint32_t first() {
    if (!leads()) return cluster_.await_ticket(shared_header(), 0);
    uint32_t ticket = cluster_.index();
    if (shared_header().has_unit == 0) {
      ticket = cluster_.count() + draw_any();
    } else if (ticket >= runnable_end_) {
      fetch_control();
    }
    return cluster_.has_partner() ? published(settle(ticket), 0) : ticket;
  }

  // Draws the ticket of unit `number`. The atomic's answer is waited for where it is used, unless a partner needs it.
  __device__ __forceinline__ uint32_t draw(uint32_t number) {
    if (!leads()) return 0;
    const uint32_t drawn = draw_any();
    return cluster_.has_partner() ? published(settle(cluster_.count() + drawn), number) : drawn;
  }

  // The ticket that `draw` has drawn.
  __device__ __forceinline__ uint32_t next(uint32_t drawn, uint32_t number) {
    if (!leads()) return cluster_.await_ticket(shared_header(), number);
    return cluster_.has_partner() ? drawn : cluster_.count() + drawn;
  }

  // Whether the ticket is a unit to go on with; else it has to be settled.
  __device__ __forceinline__ bool is_unit(uint32_t ticket) const {
    return cluster_.has_partner() ? ticket != kEnd : ticket < runnable_end_;
  }

  // The unit to go on with, or kEnd. Down units wait for gate/up units, these for others where images go through a
  // ring, and the end of the launch for all units: before the first that waits, the CTA does the first units of those
  // that have not started.
  __device__ __forceinline__ uint32_t settle(uint32_t ticket) {
    if (ticket < runnable_end_) return ticket;
    if (runnable_end_ == kDeferring) ticket = vacant().deferred_ticket;
    if (runnable_end_ != schedule_.size()) {
      const int place = take_vacant();
      if (place != kNone) {
        vacant().deferred_ticket = ticket;
        runnable_end_ = kDeferring;
        return place;
      }
      runnable_end_ = schedule_.size();
    }
    return ticket < schedule_.size() ? ticket : kEnd;
  }

 private:
  static constexpr int kNone = -1;
  static constexpr uint32_t kDeferring = 0;  // as `runnable_end_`: a ticket is deferred until a vacant unit is done

  __device__ static VacantUnits& vacant() { return shared_header().vacant_units; }
  __device__ bool leads() const { return cluster_.rank() == 0; }

  // How many CTAs have started: asynchronously, to shared memory, since it is needed once, at the first down unit.
  __device__ __forceinline__ void fetch_control() const {
    ptx::wait_copies<0>();  // the one before, which is here: else it might come after this one
    ptx::copy_async_16(&vacant().control, args_.control, true);
    ptx::commit_copies();
  }

  // Counted behind the units that are a CTA's own; draws nothing while a ticket is deferred.
  __device__ __forceinline__ uint32_t draw_any() const {
    if (runnable_end_ == kDeferring) return 0;
    const uint32_t drawn = atomicAdd(SharedMap<Orientation>::counters(args_).next_unit(), 1);
    if (runnable_end_ != schedule_.size()) fetch_control();
    return drawn;
  }

  // In order: a down unit may have to wait for one with a lower number, which somebody has by then. One pass, since
  // what is claimed stays claimed.
  __device__ __forceinline__ int take_vacant() const {
    ptx::wait_copies<0>();
    if (all_started(vacant().control.launch)) return kNone;
    for (const int64_t begin = ptx::cycles(); vacant().places_tried == 0 && ptx::cycles() - begin < kTakeOverCycles;) {
      if (all_started(launch_now(args_))) return kNone;
    }
    const int places = min(cluster_.count(), schedule_.size());
    for (int place = vacant().places_tried; place < places; ++place) {
      if (!take_over(args_.control->unit_claims + place * cluster_.ctas())) continue;
      vacant().places_tried = place + 1;
      return place;
    }
    return kNone;
  }

  __device__ __forceinline__ uint32_t published(uint32_t ticket, uint32_t number) const {
    if (cluster_.has_partner()) cluster_.publish_ticket(shared_header(), number, ticket);
    return ticket;
  }

  const MoeArguments& args_;
  const Cluster<Orientation>& cluster_;
  const UnitSchedule<Orientation>& schedule_;
  uint32_t runnable_end_;  // tickets below it need no settling: independent units, or all once nothing is vacant
};

}  // namespace megamoe
