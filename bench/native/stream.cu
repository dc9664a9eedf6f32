// What a stream of weights reaches before any arithmetic: chunk sizes, access patterns, token tiles loaded beside the
// weights, and how long flags take while the memory is busy. The steps before the fused kernel in
// docs/performance-log.md.
//   stream [MB...]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/bounded_wait.cuh"
#include "common/ptx/bulk_copy.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory_order.cuh"
#include "timing.h"

namespace {

using namespace megamoe;

constexpr int kKilo = 1024;
using probe::kInputs;

// Chunks of consecutive CTAs neighbour each other, or every CTA reads units of its own: the first two thirds of the
// bytes in units of `gate_up_kb`, the rest in units of `down_kb`, in turn or by ticket.
enum class Pattern { kInterleaved, kUnits, kTickets };

struct Setup {
  const uint8_t* buffer;
  size_t buffer_bytes;
  size_t start;
  size_t bytes;
  const uint8_t* tokens;  // stays in L2
  uint32_t* counters;     // [0] tickets, [1] departed, [2] flag
  uint32_t* latencies;    // [3]: load_acquire, returning atomic, store and release, in nanoseconds of SM 0
  int gate_up_bytes;
  int down_bytes;
};

template <int kChunk, int kStages, int kTokenBytes>
struct Shared {
  alignas(1024) uint8_t ring[kStages][kChunk + kTokenBytes];
  uint64_t full[kStages];
  volatile int end;
};

template <int kChunk, int kStages, int kTokenBytes, Pattern kPattern, bool kLatencies>
__global__ void __launch_bounds__(64, 1) stream(const Setup s) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<kChunk, kStages, kTokenBytes>*>(raw);
  if (threadIdx.x == 0) {
    for (auto& barrier : shared.full) ptx::mbarrier_init(&barrier, 1);
    ptx::mbarrier_init_fence();
    shared.end = 0;
  }
  __syncthreads();
  if (threadIdx.x == 32 && kLatencies) {
    uint32_t count = 0;
    uint64_t total[3] = {0, 0, 0};
    while (shared.end == 0) {
      const uint64_t t0 = clock64();
      const uint32_t seen = ptx::load_acquire(s.counters + 2);
      if (seen == 0xffffffffu) break;
      const uint64_t t1 = clock64();
      const uint32_t old = atomicAdd(s.counters + 64 + blockIdx.x * 32, 1);
      if (old == 0xffffffffu) break;
      const uint64_t t2 = clock64();
      for (int i = 0; i < 8; ++i) s.counters[8192 + blockIdx.x * 1024 + i * 32] = count;
      __threadfence();
      const uint64_t t3 = clock64();
      total[0] += t1 - t0, total[1] += t2 - t1, total[2] += t3 - t2;
      ++count;
    }
    for (int i = 0; i < 3; ++i) atomicAdd(s.latencies + i, static_cast<uint32_t>(total[i] / max(count, 1u)));
    atomicAdd(s.latencies + 3, 1);
  }
  if (threadIdx.x != 0) return;

  const size_t gate_up = s.bytes / 3 * 2 / s.gate_up_bytes;
  const size_t units = gate_up + (s.bytes - gate_up * s.gate_up_bytes) / s.down_bytes;
  const size_t chunks = s.bytes / kChunk;
  size_t unit = blockIdx.x, offset = 0, left = 0, chunk = blockIdx.x;
  auto next_unit = [&]() {
    if (unit >= units) return false;
    offset = unit < gate_up ? unit * s.gate_up_bytes : gate_up * s.gate_up_bytes + (unit - gate_up) * s.down_bytes;
    left = unit < gate_up ? s.gate_up_bytes : s.down_bytes;
    unit = kPattern == Pattern::kTickets ? gridDim.x + atomicAdd(s.counters, 1) : unit + gridDim.x;
    return true;
  };
  auto load = [&](int stage) {
    if (kPattern == Pattern::kInterleaved) {
      if (chunk >= chunks) return false;
      offset = chunk * kChunk;
      chunk += gridDim.x;
    } else if (left == 0 && !next_unit()) {
      return false;
    }
    size_t at = s.start + offset;
    if (at >= s.buffer_bytes) at -= s.buffer_bytes;
    ptx::mbarrier_arrive_expect_tx(&shared.full[stage], kChunk + kTokenBytes);
    ptx::bulk_copy_global_to_shared(shared.ring[stage], s.buffer + at, kChunk, &shared.full[stage]);
    if (kTokenBytes > 0) {
      ptx::bulk_copy_global_to_shared(shared.ring[stage] + kChunk, s.tokens + offset % (1 << 20) / kChunk * kTokenBytes,
                                      kTokenBytes, &shared.full[stage]);
    }
    if (kPattern != Pattern::kInterleaved) offset += kChunk, left -= kChunk;
    return true;
  };
  int in_flight = 0, stage = 0;
  uint32_t parity = 0, sum = 0;
  for (int i = 0; i < kStages; ++i) in_flight += load(i);
  while (in_flight > 0) {
    megamoe::await(&shared.full[stage], parity);
    sum += shared.ring[stage][0];
    --in_flight;
    in_flight += load(stage);
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  shared.end = 1;
  if (sum == 0xffffffffu) s.counters[3] = sum;
  if (atomicInc(s.counters + 1, gridDim.x - 1) == gridDim.x - 1) s.counters[0] = 0;
}

template <int kChunkKb, int kStages, int kTokenBytes, Pattern kPattern, bool kLatencies = false>
void time_stream(const char* name, Setup s, int sms) {
  constexpr int kChunk = kChunkKb * kKilo;
  constexpr int kBytes = sizeof(Shared<kChunk, kStages, kTokenBytes>);
  static_assert(kBytes <= 232448);
  auto* kernel = stream<kChunk, kStages, kTokenBytes, kPattern, kLatencies>;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  CHECK(cudaMemset(s.counters, 0, 4096 * kKilo));
  CHECK(cudaMemset(s.latencies, 0, 16));
  const double us = probe::graph_microseconds([&](int i, cudaStream_t stream) {
    s.start = s.buffer_bytes / kInputs * i / (1 << 20) * (1 << 20);
    kernel<<<sms, 64, kBytes, stream>>>(s);
  });
  std::printf("%4zu MB  %-34s %7.1f us  %5.0f GB/s", s.bytes / 1000000, name, us, s.bytes / us / 1000);
  if (kLatencies) {
    uint32_t l[4];
    CHECK(cudaMemcpy(l, s.latencies, 16, cudaMemcpyDeviceToHost));
    std::printf("  cycles: load_acquire %u, atomic %u, 8 stores + fence %u", l[0] / l[3], l[1] / l[3], l[2] / l[3]);
  }
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  int sms;
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  Setup s{};
  s.buffer_bytes = 3ull << 30;
  uint8_t *buffer, *tokens;
  CHECK(cudaMalloc(&buffer, s.buffer_bytes));
  CHECK(cudaMalloc(&tokens, 4 << 20));
  CHECK(cudaMalloc(&s.counters, 4096 * kKilo));
  CHECK(cudaMalloc(&s.latencies, 16));
  CHECK(cudaMemset(tokens, 7, 4 << 20));
  std::vector<uint32_t> noise(64 << 20 >> 2);
  for (size_t i = 0; i < noise.size(); ++i) noise[i] = std::rand();
  for (size_t at = 0; at < s.buffer_bytes; at += 64 << 20) {
    CHECK(cudaMemcpy(buffer + at, noise.data(), 64 << 20, cudaMemcpyHostToDevice));
  }
  s.buffer = buffer, s.tokens = tokens;
  s.gate_up_bytes = 512 * kKilo, s.down_bytes = 128 * kKilo;
  std::vector<int> sizes;
  for (int i = 1; i < argc; ++i) sizes.push_back(std::atoi(argv[i]));
  if (sizes.empty()) sizes = {150, 630, 805};
  for (int mb : sizes) {
    s.bytes = static_cast<size_t>(mb) * 1000000 / (512 * kKilo) * (512 * kKilo);
    using P = Pattern;
    time_stream<32, 6, 0, P::kInterleaved>("6x32K interleaved", s, sms);
    time_stream<16, 12, 0, P::kTickets>("12x16K tickets", s, sms);
    time_stream<16, 6, 0, P::kTickets>("6x16K tickets", s, sms);
    time_stream<16, 4, 0, P::kTickets>("4x16K tickets", s, sms);
    time_stream<16, 3, 0, P::kTickets>("3x16K tickets", s, sms);
    time_stream<32, 3, 0, P::kTickets>("3x32K tickets", s, sms);
    time_stream<32, 2, 0, P::kTickets>("2x32K tickets", s, sms);
    time_stream<16, 4, 6144, P::kTickets>("4x(16K+6K) tickets", s, sms);
    time_stream<32, 2, 12288, P::kTickets>("2x(32K+12K) tickets", s, sms);
    time_stream<32, 3, 12288, P::kTickets>("3x(32K+12K) tickets", s, sms);
    time_stream<16, 12, 0, P::kTickets, true>("12x16K tickets, flags", s, sms);
    time_stream<16, 8, 0, P::kTickets, true>("8x16K tickets, flags", s, sms);
    time_stream<16, 6, 0, P::kTickets, true>("6x16K tickets, flags", s, sms);
    time_stream<16, 5, 0, P::kTickets, true>("5x16K tickets, flags", s, sms);
    time_stream<16, 4, 0, P::kTickets, true>("4x16K tickets, flags", s, sms);
    time_stream<16, 3, 0, P::kTickets, true>("3x16K tickets, flags", s, sms);
    time_stream<32, 3, 0, P::kTickets, true>("3x32K tickets, flags", s, sms);
    time_stream<32, 2, 0, P::kTickets, true>("2x32K tickets, flags", s, sms);
  }
  return 0;
}
