// Tries and measures what expert parallelism asks of the wires: pushes, flags and bounded waits between all ranks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace megamoe {

enum class WireTestMode : int32_t {
  kVerify = 0,     // a pattern to every peer, a flag, and a look at what the peers sent
  kRoundTrip = 1,  // a flag to each peer and back
  kPush = 2,       // bytes to one peer (or all), acknowledged after the last
};

// One row for each peer, all zero where nothing was asked of it.
struct WireTestRow {
  int64_t failed_phase;  // a `WireTestPhase`, or 0
  int64_t epoch;         // of this launch
  int64_t wanted, seen;  // the flag of the wait that failed
  int64_t nanoseconds;
  int64_t mismatches;  // words that are not what the peer sent
  int64_t axis_index;  // as the operand has it: has to be the rank
  int64_t bytes;
};

enum class WireTestPhase : int64_t {
  kNone = 0,
  kInboxFree = 1,
  kFlag = 2,
  kPing = 3,
  kArrival = 4,
  kAcknowledgement = 5
};

struct WireTestArguments {
  void* const* peers;  // on the device, [num_ranks]
  int rank, num_ranks;
  WireTestMode mode;
  int64_t bytes;   // pushed to each peer; a multiple of 16
  int iterations;  // round trips, or pushes
  int shift;       // kPush: to rank + shift only; 0 means to all others at once
  int mute;        // a rank that keeps silent, to see the others' waits end; -1 for none
  uint64_t timeout_nanoseconds;
  const int32_t* axis_index;  // on the device
  WireTestRow* rows;          // on the device, [num_ranks], zeroed
};

constexpr int kWireTestMaxRanks = 64;
constexpr int kWireTestMaxIterations = 1 << 20;

// Bytes of symmetric memory that the test uses.
size_t wire_test_bytes(int num_ranks, int64_t bytes);

// Loads the kernel on the current device: a lazy load at the first launch may wait for a peer's kernel, which waits for
// us.
cudaError_t prepare_wire_test();

cudaError_t launch_wire_test(const WireTestArguments& arguments, cudaStream_t stream);

}  // namespace megamoe
