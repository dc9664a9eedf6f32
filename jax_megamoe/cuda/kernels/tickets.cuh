// Which units a cluster works on, by their numbers in the schedule: the first is its own, the others it draws, so that a
// CTA that is slow for whatever reason takes fewer.
#pragma once

#include <cstdint>

#include "kernels/cluster.cuh"
#include "kernels/places.cuh"
#include "kernels/pipeline.cuh"
#include "kernels/waiting.cuh"

namespace megamoe {

// One thread of each CTA, the weight producer. The one of rank 0 in the cluster draws, and tells its partner. What is
// seldom needed is kept in shared memory (VacantUnits): the thread has no registers to spare.
template <bool kSwap>
class UnitTickets {
 public:
  __device__ UnitTickets(const MoeArguments& args, const Cluster<kSwap>& cluster, const UnitSchedule<kSwap>& schedule)
      : args_(args), cluster_(cluster), schedule_(schedule), plain_(schedule.num_gate_up()) {}

  static constexpr uint32_t kEnd = ~0u;  // there are no more

  // The ticket of unit number 0.
  __device__ __forceinline__ uint32_t first() {
    if (!leads()) return cluster_.await_ticket(shared_header(), 0);
    uint32_t ticket = cluster_.index();
    if (shared_header().has_unit == 0) {
      ticket = cluster_.count() + draw_any();
    } else if (ticket >= plain_) {
      ask_who_started();
    }
    return cluster_.has_partner() ? told(settle(ticket), 0) : ticket;
  }

  // Asks for the ticket of unit `number`; the answer is waited for where it is used, unless another CTA is to hear of it.
  __device__ __forceinline__ uint32_t draw(uint32_t number) {
    if (!leads()) return 0;
    const uint32_t drawn = draw_any();
    return cluster_.has_partner() ? told(settle(cluster_.count() + drawn), number) : drawn;
  }

  // What `draw` has asked for.
  __device__ __forceinline__ uint32_t next(uint32_t drawn, uint32_t number) {
    if (!leads()) return cluster_.await_ticket(shared_header(), number);
    return cluster_.has_partner() ? drawn : cluster_.count() + drawn;
  }

  // Whether the ticket is a unit to go on with; else it has to be settled.
  __device__ __forceinline__ bool is_unit(uint32_t ticket) const {
    return cluster_.has_partner() ? ticket != kEnd : ticket < plain_;
  }

  // The unit to go on with, or kEnd. Down units wait for all gate/up units, and the end of the launch for all units: before the first of
  // them, the CTA does the first units of those that have not started.
  __device__ __forceinline__ uint32_t settle(uint32_t ticket) {
    if (ticket < plain_) return ticket;
    if (plain_ == kPutOff) ticket = vacant().put_off;
    if (plain_ != schedule_.size()) {
      const int place = take_vacant();
      if (place != kNone) {
        vacant().put_off = ticket;
        plain_ = kPutOff;
        return place;
      }
      plain_ = schedule_.size();
    }
    return ticket < schedule_.size() ? ticket : kEnd;
  }

 private:
  static constexpr int kNone = -1;
  static constexpr uint32_t kPutOff = 0;  // as `plain_`: a ticket waits until a vacant unit is done

  __device__ static VacantUnits& vacant() { return shared_header().vacant_units; }
  __device__ bool leads() const { return cluster_.rank() == 0; }

  // Asynchronously, to shared memory: the answer is needed once, at the first down unit.
  __device__ __forceinline__ void ask_who_started() const {
    ptx::wait_copies<0>();  // the one before, which is here: else it might come after this one
    ptx::copy_async_16(&vacant().control, args_.control, true);
    ptx::commit_copies();
  }

  // Behind the units that are somebody's own; nothing while a ticket waits.
  __device__ __forceinline__ uint32_t draw_any() const {
    if (plain_ == kPutOff) return 0;
    const uint32_t drawn = atomicAdd(SharedMap<kSwap>::counters(args_).next_unit(), 1);
    if (plain_ != schedule_.size()) ask_who_started();
    return drawn;
  }

  // In order: a down unit may have to wait for one with a lower number, which somebody has by then. One pass, since what is claimed
  // stays claimed.
  __device__ __forceinline__ int take_vacant() const {
    ptx::wait_copies<0>();
    if (all_started(vacant().control.launch)) return kNone;
    for (const int64_t begin = ptx::cycles(); vacant().looked_at == 0 && ptx::cycles() - begin < kPatienceCycles;) {
      if (all_started(launch_now(args_))) return kNone;
    }
    const int places = min(cluster_.count(), schedule_.size());
    for (int place = vacant().looked_at; place < places; ++place) {
      if (!take_over(args_.control->unit_claims + place * cluster_.ctas())) continue;
      vacant().looked_at = place + 1;
      return place;
    }
    return kNone;
  }

  __device__ __forceinline__ uint32_t told(uint32_t ticket, uint32_t number) const {
    if (cluster_.has_partner()) cluster_.tell_ticket(shared_header(), number, ticket);
    return ticket;
  }

  const MoeArguments& args_;
  const Cluster<kSwap>& cluster_;
  const UnitSchedule<kSwap>& schedule_;
  uint32_t plain_;  // tickets below it are units to go on with: gate/up units, or all once nothing is vacant
};

}  // namespace megamoe
