// What the tensor core takes for small token tiles: cycles per multiply of 64 weight rows x N tokens x 32 of K, by how many
// are in a group, how many groups are in flight, and how many warpgroups of an SM multiply at once.
#include <cuda_runtime.h>

#include <cstdio>

#include "common/wgmma.cuh"

namespace {

using namespace megamoe;

// kPromote: each group's sum is scaled by token and weight scales from shared memory and added, as the kernel does.
template <int kN, int kPerGroup, int kInFlight, bool kPromote>
__global__ void __launch_bounds__(384, 1) multiply(long long* cycles, float* sink, int rounds) {
  extern __shared__ __align__(1024) uint8_t shared[];
  for (int i = threadIdx.x; i < 65536 / 4; i += blockDim.x) {
    reinterpret_cast<uint32_t*>(shared)[i] = i < 49152 / 4 ? 0x31383038u + i * 0x01010101u % 0x07070707u : 0x3f800000u;
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const int group = threadIdx.x / 128;
  const float* scales = reinterpret_cast<const float*>(shared + 49152) + threadIdx.x % 4 * 2;
  float first[kN / 2], second[kN / 2], total[kN / 2] = {};
  auto start_group = [&](float (&d)[kN / 2], int r) {
    const uint64_t a = wgmma::make_descriptor(shared + group * 8192);
    const uint64_t b = wgmma::make_descriptor(shared + 32768);
    wgmma::pin(d);
    wgmma::fence();
    wgmma::multiply_block<kN, kPerGroup>(d, a, b);
    wgmma::commit();
  };
  auto add = [&](float (&d)[kN / 2], int r) {
    wgmma::pin(d);
    if constexpr (kPromote) {
      const float2 weight = *reinterpret_cast<const float2*>(scales + (r & 7) * 128);
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        const float2 token = *reinterpret_cast<const float2*>(scales + (r & 3) * 256 + 8 * j);
        total[4 * j + 0] = fmaf(token.x * weight.x, d[4 * j + 0], total[4 * j + 0]);
        total[4 * j + 1] = fmaf(token.y * weight.x, d[4 * j + 1], total[4 * j + 1]);
        total[4 * j + 2] = fmaf(token.x * weight.y, d[4 * j + 2], total[4 * j + 2]);
        total[4 * j + 3] = fmaf(token.y * weight.y, d[4 * j + 3], total[4 * j + 3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) total[i] += d[i];
    }
  };
  const long long start = clock64();
  if constexpr (kInFlight == 1) {
    for (int r = 0; r < rounds; ++r) {
      start_group(first, r);
      wgmma::wait<0>();
      add(first, r);
    }
  } else {
    start_group(first, 0);
    for (int r = 0; r < rounds / 2 - 1; ++r) {
      start_group(second, r);
      wgmma::wait<1>();
      add(first, r);
      start_group(first, r);
      wgmma::wait<1>();
      add(second, r);
    }
    start_group(second, 0);
    wgmma::wait<1>();
    add(first, 0);
    wgmma::wait<0>();
    add(second, 1);
  }
  const long long stop = clock64();
  float sum = 0;
  for (float v : total) sum += v;
  if (sum == 12345.678f) sink[0] = sum;
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = stop - start;
}

template <int kN, int kPerGroup, int kInFlight, bool kPromote>
void time_multiply() {
  long long* cycles;
  float* sink;
  cudaMallocHost(&cycles, 8);
  cudaMalloc(&sink, 4);
  constexpr int kRounds = 300;
  auto* kernel = multiply<kN, kPerGroup, kInFlight, kPromote>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536);
  std::printf("N %3d, %d per group, %d in flight%s:", kN, kPerGroup, kInFlight, kPromote ? ", promoted" : "");
  for (int groups = 1; groups <= 3; ++groups) {
    for (int i = 0; i < 2; ++i) kernel<<<132, groups * 128, 65536>>>(cycles, sink, kRounds);
    cudaDeviceSynchronize();
    std::printf("  %d warpgroups %6.1f", groups, static_cast<double>(*cycles) / kRounds);
  }
  std::printf(" cycles a group  %s\n", cudaGetErrorString(cudaGetLastError()));
}

template <int kN>
void time_tile() {
  time_multiply<kN, 4, 1, false>();
  time_multiply<kN, 4, 2, false>();
  time_multiply<kN, 2, 1, true>();
  time_multiply<kN, 2, 2, true>();
  time_multiply<kN, 4, 1, true>();
  time_multiply<kN, 4, 2, true>();
}

}  // namespace

int main() {
  time_tile<8>();
  time_tile<16>();
  time_tile<32>();
  time_tile<56>();
  return 0;
}
