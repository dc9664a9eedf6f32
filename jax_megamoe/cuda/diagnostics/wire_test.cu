#include "diagnostics/wire_test.h"

#include "common/bounded_wait.cuh"
#include "common/ptx/clock.cuh"
#include "common/ptx/memory_order.cuh"

namespace megamoe {

namespace {

constexpr int kThreads = 256;
constexpr int kPushBlocks = 16;  // for each target: 8 targets leave no block of an H100 waiting for an SM

// What rank `src` and this rank tell each other, in this rank's buffer; one cache line, so that pairs don't disturb
// others.
struct alignas(128) Cell {
  // Written by the peer.
  uint64_t flag;     // epoch whose pattern has arrived
  uint64_t ack;      // epoch up to which the peer has read this rank's pushes
  uint64_t ping;     // epoch and round, from the one who asks
  uint64_t pong;     // the same, from the one who answers
  uint64_t arrived;  // blocks of the peer that have pushed, ever
  // Written by this rank.
  uint64_t pushed;    // epoch of the last push to the peer
  uint64_t expected;  // what `arrived` was after the last launch
};

struct Header {
  alignas(128) uint64_t epoch;  // launches that are over
  unsigned int finished;        // blocks of this launch that are
  Cell cells[kWireTestMaxRanks];
};

constexpr size_t kInboxOffset = (sizeof(Header) + 4095) / 4096 * 4096;

// 64 bits that depend on who sends to whom, when and where.
__device__ uint64_t pattern(int src, int dst, uint64_t epoch, int64_t word) {
  uint64_t value = (static_cast<uint64_t>(src) << 56) ^ (static_cast<uint64_t>(dst) << 48) ^ (epoch << 24) ^
                   static_cast<uint64_t>(word);
  value *= 0x9e3779b97f4a7c15ull;
  return value ^ (value >> 29);
}

class WireTest {
 public:
  __device__ explicit WireTest(const WireTestArguments& arguments) : a_(arguments), own_(header(arguments.rank)) {
    // Before any block of this launch can have ended, hence before the last one advances it.
    epoch_ = own_->epoch + 1;
  }

  __device__ void run() {
    switch (a_.mode) {
      case WireTestMode::kVerify:
        verify(blockIdx.y);
        break;
      case WireTestMode::kRoundTrip:
        if (threadIdx.x == 0) round_trip(blockIdx.y);
        break;
      case WireTestMode::kPush: {
        const int shift = a_.shift != 0 ? a_.shift : static_cast<int>(blockIdx.y);
        // In a ring of shifts each rank sends to one and hears from one.
        const int dst = (a_.rank + shift) % a_.num_ranks, src = (a_.rank - shift + a_.num_ranks) % a_.num_ranks;
        if (shift != 0 || a_.num_ranks == 1) push(dst, src);
      }
    }
    finish();
  }

 private:
  __device__ Header* header(int rank) const { return static_cast<Header*>(a_.peers[rank]); }
  __device__ uint4* inbox(int owner, int src) const {
    return reinterpret_cast<uint4*>(static_cast<char*>(a_.peers[owner]) + kInboxOffset + src * a_.bytes);
  }
  __device__ bool is_mute() const { return a_.rank == a_.mute; }

  // One thread waits, the whole block learns how it ended. What the peer did before it set the flag is visible to all
  // threads afterwards: acquired by one, passed on by the barrier.
  __device__ bool block_wait(const uint64_t* flag, uint64_t target, WireTestPhase phase, int peer) {
    __shared__ bool came;
    if (threadIdx.x == 0) came = wait(flag, target, phase, peer);
    __syncthreads();
    const bool result = came;
    __syncthreads();
    return result;
  }

  __device__ bool wait(const uint64_t* flag, uint64_t target, WireTestPhase phase, int peer) {
    uint64_t seen;
    if (wait_system(flag, target, a_.timeout_nanoseconds, &seen)) return true;
    WireTestRow& row = a_.rows[peer];
    row.failed_phase = static_cast<int64_t>(phase);
    row.wanted = static_cast<int64_t>(target);
    row.seen = static_cast<int64_t>(seen);
    return false;
  }

  __device__ void begin_row(int peer) {
    if (threadIdx.x != 0 || blockIdx.x != 0) return;
    a_.rows[peer].epoch = static_cast<int64_t>(epoch_);
    a_.rows[peer].axis_index = *a_.axis_index;
  }

  __device__ void fill(int dst, int64_t first, int64_t step) {
    uint4* out = inbox(dst, a_.rank);
    for (int64_t i = first; i < a_.bytes / 16; i += step) {
      const uint64_t low = pattern(a_.rank, dst, epoch_, 2 * i), high = pattern(a_.rank, dst, epoch_, 2 * i + 1);
      out[i] = make_uint4(low, low >> 32, high, high >> 32);
    }
  }

  __device__ void verify(int peer) {
    begin_row(peer);
    Cell& cell = own_->cells[peer];
    Cell& there = header(peer)->cells[a_.rank];
    if (!block_wait(&cell.ack, cell.pushed, WireTestPhase::kInboxFree, peer)) return;
    if (!is_mute()) {
      fill(peer, threadIdx.x, kThreads);
      __syncthreads();
      if (threadIdx.x == 0) {
        cell.pushed = epoch_;
        ptx::store_release_system(&there.flag, epoch_);
      }
    }
    if (!block_wait(&cell.flag, epoch_, WireTestPhase::kFlag, peer)) return;
    const uint4* in = inbox(a_.rank, peer);
    int wrong = 0;
    for (int64_t i = threadIdx.x; i < a_.bytes / 16; i += kThreads) {
      const uint4 got = in[i];
      const uint64_t low = pattern(peer, a_.rank, epoch_, 2 * i), high = pattern(peer, a_.rank, epoch_, 2 * i + 1);
      wrong += (got.x | static_cast<uint64_t>(got.y) << 32) != low;
      wrong += (got.z | static_cast<uint64_t>(got.w) << 32) != high;
    }
    if (wrong != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(&a_.rows[peer].mismatches),
                static_cast<unsigned long long>(wrong));
    }
    __syncthreads();  // all have read before the peer may write again
    if (threadIdx.x != 0) return;
    ptx::store_release_system(&there.ack, epoch_);
    a_.rows[peer].bytes = a_.bytes;
  }

  // The lower rank asks, the higher one answers; alone, a rank answers itself.
  __device__ void round_trip(int peer) {
    begin_row(peer);
    Cell& cell = own_->cells[peer];
    Cell& there = header(peer)->cells[a_.rank];
    uint64_t start = 0;
    for (int round = 0; round <= a_.iterations; ++round) {
      // Round 0 waits for the peer to have started, and is not timed.
      if (round == 1) start = ptx::global_nanoseconds();
      const uint64_t value = epoch_ * kWireTestMaxIterations * 2 + round;
      if (a_.rank <= peer && !is_mute()) ptx::store_release_system(&there.ping, value);
      if (a_.rank >= peer) {
        if (!wait(&cell.ping, value, WireTestPhase::kPing, peer)) return;
        if (!is_mute()) ptx::store_release_system(&there.pong, value);
      }
      if (a_.rank <= peer && !wait(&cell.pong, value, WireTestPhase::kPing, peer)) return;
    }
    a_.rows[peer].nanoseconds = static_cast<int64_t>(ptx::global_nanoseconds() - start);
  }

  __device__ void push(int dst, int src) {
    begin_row(dst);
    Cell& to = own_->cells[dst];
    Cell& from = own_->cells[src];
    if (!block_wait(&to.ack, to.pushed, WireTestPhase::kInboxFree, dst)) return;
    const uint64_t start = ptx::global_nanoseconds();
    for (int i = 0; i < a_.iterations && !is_mute(); ++i)
      fill(dst, blockIdx.x * kThreads + threadIdx.x, kPushBlocks * kThreads);
    __syncthreads();
    if (threadIdx.x == 0 && !is_mute()) ptx::add_release_system(&header(dst)->cells[a_.rank].arrived, uint64_t{1});
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    const uint64_t target = from.expected + kPushBlocks;
    if (!wait(&from.arrived, target, WireTestPhase::kArrival, dst)) return;
    from.expected = target;
    ptx::store_release_system(&header(src)->cells[a_.rank].ack, epoch_);
    if (!wait(&to.ack, epoch_, WireTestPhase::kAcknowledgement, dst)) return;
    a_.rows[dst].nanoseconds = static_cast<int64_t>(ptx::global_nanoseconds() - start);
    a_.rows[dst].bytes = a_.bytes * a_.iterations;
  }

  // The last block of the launch counts it.
  __device__ void finish() {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(&own_->finished, 1u) != gridDim.x * gridDim.y - 1) return;
    own_->finished = 0;
    own_->epoch = epoch_;
  }

  const WireTestArguments& a_;
  Header* own_;
  uint64_t epoch_;
};

__global__ void __launch_bounds__(kThreads) wire_test(const __grid_constant__ WireTestArguments arguments) {
  WireTest(arguments).run();
}

}  // namespace

size_t wire_test_bytes(int num_ranks, int64_t bytes) { return kInboxOffset + static_cast<size_t>(num_ranks) * bytes; }

cudaError_t prepare_wire_test() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, wire_test);
}

cudaError_t launch_wire_test(const WireTestArguments& arguments, cudaStream_t stream) {
  const bool is_push = arguments.mode == WireTestMode::kPush;
  const dim3 grid(is_push ? kPushBlocks : 1, is_push && arguments.shift != 0 ? 1 : arguments.num_ranks);
  wire_test<<<grid, kThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace megamoe
