// What the tensor core takes for small token tiles: cycles per multiply of 64 weight rows x N tokens x 32 of K, by how many
// are in a group, how many groups are in flight, and how many warpgroups of an SM multiply at once.
#include <cuda_runtime.h>

#include <cstdio>

#include "common/wgmma.cuh"

namespace {

using namespace megamoe;

template <int kN, int kPerGroup, int kInFlight>
__global__ void __launch_bounds__(384, 1) multiply(long long* cycles, float* sink, int rounds) {
  extern __shared__ __align__(1024) uint8_t shared[];
  for (int i = threadIdx.x; i < 65536 / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(shared)[i] = 0x38383838u + i % 3;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const int group = threadIdx.x / 128;
  const uint64_t a = wgmma::make_descriptor(shared + group * 8192);
  const uint64_t b = wgmma::make_descriptor(shared + 32768);
  float first[kN / 2], second[kN / 2], total[kN / 2] = {};
  auto start_group = [&](float (&d)[kN / 2]) {
    wgmma::pin(d);
    wgmma::fence();
#pragma unroll
    for (int s = 0; s < kPerGroup; ++s) wgmma::Multiply<kN>::run(d, a + s % 4 * 2, b + s % 4 * 2, s != 0);
    wgmma::commit();
  };
  auto add = [&](float (&d)[kN / 2]) {
    wgmma::pin(d);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) total[i] = fmaf(d[i], 0.5f, total[i]);
  };
  const long long start = clock64();
  if constexpr (kInFlight == 1) {
    for (int r = 0; r < rounds; ++r) {
      start_group(first);
      wgmma::wait<0>();
      add(first);
    }
  } else {
    start_group(first);
    for (int r = 0; r < rounds / 2; ++r) {
      start_group(second);
      wgmma::wait<1>();
      add(first);
      start_group(first);
      wgmma::wait<1>();
      add(second);
    }
  }
  wgmma::wait<0>();
  const long long stop = clock64();
  float sum = 0;
  for (float v : total) sum += v;
  if (sum == 12345.678f) sink[0] = sum;
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = stop - start;
}

template <int kN, int kPerGroup, int kInFlight>
void time_multiply() {
  long long* cycles;
  float* sink;
  cudaMallocManaged(&cycles, 8);
  cudaMalloc(&sink, 4);
  constexpr int kRounds = 300;
  cudaFuncSetAttribute(multiply<kN, kPerGroup, kInFlight>, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536);
  std::printf("N %3d, %d per group, %d in flight:", kN, kPerGroup, kInFlight);
  for (int groups = 1; groups <= 3; ++groups) {
    for (int i = 0; i < 2; ++i) multiply<kN, kPerGroup, kInFlight><<<132, groups * 128, 65536>>>(cycles, sink, kRounds);
    cudaDeviceSynchronize();
    std::printf("  %d warpgroups %6.1f cycles", groups, static_cast<double>(*cycles) / kRounds / kPerGroup);
  }
  std::printf("  %s\n", cudaGetErrorString(cudaGetLastError()));
}

template <int kN>
void time_tile() {
  time_multiply<kN, 2, 1>();
  time_multiply<kN, 4, 1>();
  time_multiply<kN, 2, 2>();
  time_multiply<kN, 4, 2>();
}

}  // namespace

int main() {
  time_tile<8>();
  time_tile<16>();
  time_tile<32>();
  time_tile<56>();
  time_tile<128>();
  return 0;
}
