// Timestamps of one thread's progress, for development: compiled in only with MEGAMOE_TRACE, as `scripts/probe build`
// does for build/probe_trace. bench/native/show_trace.py reads what `probe_trace trace` writes.
#pragma once

#include <cstdint>

#include "common/ptx/clock.cuh"
#include "kernels/arguments.h"

namespace megamoe {

enum class TraceRole : int { kConsumer, kWeightProducer, kTokenProducer };
enum class TraceEvent : uint64_t {
  kStart,
  kPlanned,
  kDispatched,
  kUnitLanded,      // the first stage of a unit
  kUnitMultiplied,  // its last stage
  kUnitFinished,    // its epilogue
  kCombineReady,
  kCombined,
  kGateUpIssued,
  kDownIssued,
  kTokensReady,
  kCounted,
  kPlaced,  // the share's routes have targets
  kStored,  // the share's images are stored
};

class Tracer {
 public:
#ifdef MEGAMOE_TRACE
  static constexpr int kRoles = 3;
  static constexpr int kCapacity = 512;

  __device__ Tracer(const MoeArguments& args, TraceRole role)
      : next_(args.trace == nullptr ? nullptr
                                    : args.trace + (blockIdx.x * kRoles + static_cast<int>(role)) * kCapacity) {}
  // Time in nanoseconds, shifted, beside the event.
  __device__ void mark(TraceEvent event) {
    if (next_ != nullptr) *next_++ = ptx::global_nanoseconds() << 8 | static_cast<uint64_t>(event);
  }
  // By the CTA's first thread, for all consumers.
  __device__ void mark_by_first(TraceEvent event) {
    if (threadIdx.x == 0) mark(event);
  }

 private:
  uint64_t* next_;
#else
  __device__ Tracer(const MoeArguments&, TraceRole) {}
  __device__ void mark(TraceEvent) {}
  __device__ void mark_by_first(TraceEvent) {}
#endif
};

}  // namespace megamoe
