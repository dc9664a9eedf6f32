// How fast the device can stream bytes into shared memory: one CTA per SM, one thread, a ring of 1-D bulk copies.
#include "testing/read_ceiling.h"

#include "common/bounded_wait.cuh"
#include "common/ptx/bulk_copy.cuh"
#include "common/ptx/mbarrier.cuh"

namespace megamoe {

namespace {

constexpr int kCeilingChunk = 32 * 1024;
constexpr int kCeilingStages = 6;

// Chunk c of the stream is (start + c * chunk) mod total: a window of `bytes` that may wrap around the buffer.
__global__ void __launch_bounds__(32, 1)
    read_ceiling(const uint8_t* buffer, size_t total_chunks, size_t start_chunk, size_t chunks, uint32_t* sink) {
  extern __shared__ __align__(1024) uint8_t ring[];
  __shared__ uint64_t full[kCeilingStages];
  if (threadIdx.x != 0) return;
  for (auto& barrier : full) ptx::mbarrier_init(&barrier, 1);
  ptx::mbarrier_init_fence();
  auto load = [&](size_t chunk, int stage) {
    ptx::mbarrier_arrive_expect_tx(&full[stage], kCeilingChunk);
    ptx::bulk_copy_global_to_shared(ring + stage * kCeilingChunk,
                                    buffer + (start_chunk + chunk) % total_chunks * kCeilingChunk, kCeilingChunk,
                                    &full[stage]);
  };
  size_t next = blockIdx.x;
  for (int stage = 0; stage < kCeilingStages && next < chunks; ++stage, next += gridDim.x) load(next, stage);
  int stage = 0;
  uint32_t parity = 0, sum = 0;
  for (size_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    megamoe::await(&full[stage], parity);
    sum += ring[stage * kCeilingChunk];
    if (next < chunks) load(next, stage);
    next += gridDim.x;
    if (++stage == kCeilingStages) stage = 0, parity ^= 1;
  }
  if (sum == 0xffffffffu) *sink = sum;
}

}  // namespace

cudaError_t launch_read_ceiling(const uint8_t* buffer, size_t total, size_t start, size_t bytes, uint32_t* sink,
                                int ctas, cudaStream_t stream) {
  constexpr int kShared = kCeilingChunk * kCeilingStages;
  const cudaError_t attribute =
      cudaFuncSetAttribute(read_ceiling, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (attribute != cudaSuccess) return attribute;
  read_ceiling<<<ctas, 32, kShared, stream>>>(buffer, total / kCeilingChunk, start / kCeilingChunk,
                                              (bytes + kCeilingChunk - 1) / kCeilingChunk, sink);
  return cudaGetLastError();
}

}  // namespace megamoe
