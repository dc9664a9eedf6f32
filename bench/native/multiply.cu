// What the tensor core takes for small token tiles: cycles of a group of multiplies of 64 weight rows x N tokens x 32
// of K, by how many are in a group and how many warpgroups of an SM multiply at once. One group at a time per
// warpgroup.
#include "common/ptx/memory_order.cuh"
#include "common/wgmma.cuh"
#include "timing.h"

namespace {

using namespace megamoe;

template <int kN, int kPerGroup>
__global__ void __launch_bounds__(384, 1) multiply(long long* cycles, float* sink, int rounds) {
  extern __shared__ __align__(1024) uint8_t shared[];
  for (int i = threadIdx.x; i < 65536 / 4; i += blockDim.x) {
    reinterpret_cast<uint32_t*>(shared)[i] = 0x31383038u + i * 0x01010101u % 0x07070707u;
  }
  ptx::fence_proxy_async_shared();
  __syncthreads();
  const wgmma::Descriptor weights(shared + threadIdx.x / 128 * 8192), tokens(shared + 32768);
  float partial[kN / 2], total[kN / 2] = {};
  const long long start = clock64();
  for (int r = 0; r < rounds; ++r) {
    wgmma::pin(partial);
    wgmma::fence();
    wgmma::multiply_block<kN, kPerGroup>(partial, weights, 0, tokens, 0);
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(partial);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) total[i] += partial[i];
  }
  const long long stop = clock64();
  float sum = 0;
  for (float v : total) sum += v;
  if (sum == 12345.678f) *sink = sum;
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = stop - start;
}

template <int kN, int kPerGroup>
void time_multiply() {
  long long* cycles;
  float* sink;
  CHECK(cudaMallocHost(&cycles, sizeof(*cycles)));
  CHECK(cudaMalloc(&sink, sizeof(*sink)));
  constexpr int kRounds = 300, kShared = 65536;
  auto* kernel = multiply<kN, kPerGroup>;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  std::printf("N %3d, %d per group:", kN, kPerGroup);
  for (int groups = 1; groups <= 3; ++groups) {
    for (int i = 0; i < 2; ++i) kernel<<<132, groups * 128, kShared>>>(cycles, sink, kRounds);
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    std::printf("  %d warpgroups %6.1f", groups, static_cast<double>(*cycles) / kRounds);
  }
  std::printf(" cycles a group\n");
}

template <int... kN>
void time_tiles() {
  (time_multiply<kN, 2>(), ...);
  (time_multiply<kN, 4>(), ...);
}

}  // namespace

int main() {
  time_tiles<8, 16, 24, 32, 40, 48, 56, 128>();
  return 0;
}
