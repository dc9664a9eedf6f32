// Counters that consumers post and signal threads advance.
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/ptx/mbarrier.cuh"
#include "kernels/ring.cuh"
#include "kernels/roles.h"
#include "kernels/shared_header.cuh"

namespace megamoe {

// Announcing finished work means waiting until every store before it is visible to the whole device, a microsecond or
// two under load. A thread of its own does that for each consumer warpgroup, or for both, so that the consumers go on
// to the next unit.
template <typename Orientation>
class Signaller {
 public:
  __device__ explicit Signaller(SignalQueue& queue) : queue_(queue) {
    if constexpr (kKeepsCount) {
      uint32_t thread = threadIdx.x % kWarpgroupThreads;
      asm volatile("" : "+r"(thread));  // lest the question is kept
      if (thread == 0) count() = 0;
    }
  }

  // The warpgroup's first thread, after a barrier of the threads whose stores are announced. Null ends the signal
  // thread.
  __device__ __forceinline__ void post(uint32_t* counter) {
    if constexpr (kKeepsCount) {
      const int posted = count()++;
      cursor_ = {posted % kSignalSlots, static_cast<uint32_t>(posted / kSignalSlots % 2)};
    }
    await(&queue_.empty[cursor_.stage], cursor_.parity ^ 1);
    queue_.counter[cursor_.stage] = counter;
    ptx::mbarrier_arrive(&queue_.full[cursor_.stage]);
    cursor_.advance(kSignalSlots);
  }

 private:
  // In shared memory, since there are no registers for the cursor from unit to unit.
  static constexpr bool kKeepsCount = Orientation::kHalves || Orientation::kHasDecoders;
  __device__ static int& count() {
    uint32_t warpgroup = threadIdx.x / kWarpgroupThreads;
    asm volatile("" : "+r"(warpgroup));  // lest its address is kept in a register
    return shared_header().kept[warpgroup];
  }

  SignalQueue& queue_;
  StageCursor cursor_;
};

// A signal thread: `advance(counter)` for each that is posted in one of its queues, until all of these have ended.
template <int kQueues, typename Advance>
__device__ __forceinline__ void serve_signals(SignalQueue* queues, const Advance& advance) {
  StageCursor cursors[kQueues];
  uint32_t open = (1u << kQueues) - 1;
  WaitLimit limit;
  while (open != 0) {
#pragma unroll
    for (int q = 0; q < kQueues; ++q) {
      StageCursor& cursor = cursors[q];
      uint64_t* full = &queues[q].full[cursor.stage];
      if constexpr (kQueues == 1) {
        await(full, cursor.parity);
      } else {
        if ((open >> q & 1) == 0) continue;
        if (!ptx::mbarrier_test_wait(full, cursor.parity)) {  // which never keeps the thread from the other queue
          limit.check();
          continue;
        }
        limit = {};
      }
      uint32_t* counter = queues[q].counter[cursor.stage];
      if (counter == nullptr) {
        open &= ~(1u << q);
        continue;
      }
      ptx::mbarrier_arrive(&queues[q].empty[cursor.stage]);
      advance(counter);
      cursor.advance(kSignalSlots);
    }
  }
}

}  // namespace megamoe
