// What a large FP8 matrix product with a promotion per K block (gate/up) or per half of one (down) reaches, in the normal path's
// shape: 128 tokens x 256 weight rows a CTA, 64 x 256 a warpgroup. `resident` multiplies what lies in shared memory, `L2` has
// every K block brought from the L2, as the fused kernel does. Long enough for the clock to settle at the power limit.
#include <cuda_fp8.h>

#include <random>

#include "common/wgmma.cuh"
#include "timing.h"

namespace {

using namespace megamoe;

constexpr int kConsumers = 256, kThreads = kConsumers + 128;
constexpr int kRows = 128, kPlane = kRows * 128;  // a tile: 128 rows of 128 bytes of K
constexpr int kTiles = 2, kStageBytes = (1 + kTiles) * kPlane, kStages = 4;
constexpr int kBlocks = 4000, kSourceStages = 512;

template <bool kDown, bool kFromL2>
__global__ void __launch_bounds__(kThreads, 1) product(const uint8_t* source, long long* cycles, float* sink) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t full[kStages], empty[kStages];
  __shared__ float scales[2 * kRows + 4];
  for (int i = threadIdx.x; i < kStages * kStageBytes / 16; i += blockDim.x) {
    reinterpret_cast<uint4*>(shared)[i] = reinterpret_cast<const uint4*>(source)[i];
  }
  for (int i = threadIdx.x; i < 2 * kRows + 4; i += blockDim.x) scales[i] = 1.0f / (i + 1000);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) ptx::mbarrier_init(&full[s], 1), ptx::mbarrier_init(&empty[s], kConsumers / 32);
    ptx::mbarrier_init_fence();
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  int stage = 0;
  uint32_t parity = 0;
  auto advance = [&] {
    if (++stage == kStages) stage = 0, parity ^= 1;
  };
  if (threadIdx.x >= kConsumers) {
    ptx::decrease_registers<56>();
    if (threadIdx.x != kConsumers) return;
    for (int b = 0; b < kBlocks; ++b, advance()) {
      ptx::mbarrier_wait(&empty[stage], parity ^ 1);
      if (!kFromL2) {
        ptx::mbarrier_arrive(&full[stage]);
        continue;
      }
      const uint8_t* from = source + static_cast<size_t>((blockIdx.x % 16 * 97 + b) % kSourceStages) * kStageBytes;
      ptx::mbarrier_arrive_expect_tx(&full[stage], kStageBytes);
      for (int o = 0; o < kStageBytes; o += kPlane) {
        ptx::bulk_copy_global_to_shared(shared + stage * kStageBytes + o, from + o, kPlane, &full[stage]);
      }
    }
    return;
  }
  ptx::increase_registers<224>();
  constexpr int kParts = kDown ? 2 : 1;
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  float sums[kTiles][64] = {};
  const long long start = clock64();
#pragma unroll 1
  for (int b = 0; b < kBlocks; ++b, advance()) {
    const uint8_t* base = shared + stage * kStageBytes;
    const wgmma::Descriptor tokens(base + threadIdx.x / 128 * kPlane / 2), weights(base + kPlane);
    ptx::mbarrier_wait(&full[stage], parity);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float token[2] = {scales[part * kRows + row], scales[part * kRows + row + 8]};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        float partial[64];
        wgmma::pin(partial);
        wgmma::fence();
        wgmma::multiply_block<128, 4 / kParts>(partial, tokens, part * 64, weights, t * kPlane + part * 64);
        wgmma::commit();
        const float even = scales[2 * kRows + 2 * t], odd = scales[2 * kRows + 2 * t + 1];
        wgmma::wait<0>();
        wgmma::pin(partial);
        if (part == kParts - 1 && t == kTiles - 1) {
          __syncwarp();
          if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&empty[stage]);
        }
        const float scale[2][2] = {{token[0] * even, token[1] * even}, {token[0] * odd, token[1] * odd}};
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[t][i] = fmaf(scale[i / 4 % 2][i / 2 % 2], partial[i], sums[t][i]);
      }
    }
  }
  const long long stop = clock64();
  float sum = 0;
  for (auto& tile : sums) {
    for (float v : tile) sum += v;
  }
  if (sum == 12345.678f) *sink = sum;
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = stop - start;
}

template <bool kDown, bool kFromL2>
void time_product(const uint8_t* source) {
  constexpr int kWarmUp = 100, kLaunches = 20, kSms = 132;
  auto* kernel = product<kDown, kFromL2>;
  long long* cycles;
  float* sink;
  cudaEvent_t start, stop;
  CHECK(cudaMallocHost(&cycles, sizeof(*cycles)));
  CHECK(cudaMalloc(&sink, sizeof(*sink)));
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStages * kStageBytes));
  for (int i = 0; i < kWarmUp + kLaunches; ++i) {
    if (i == kWarmUp) CHECK(cudaEventRecord(start));
    kernel<<<kSms, kThreads, kStages * kStageBytes>>>(source, cycles, sink);
  }
  CHECK(cudaEventRecord(stop));
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  float ms;
  CHECK(cudaEventElapsedTime(&ms, start, stop));
  const double seconds = ms * 1e-3 / kLaunches;
  std::printf("%-7s %-8s %6.0f cycles a K block, %.2f GHz, %5.0f TFLOP/s\n", kDown ? "down" : "gate/up",
              kFromL2 ? "L2" : "resident", static_cast<double>(*cycles) / kBlocks, *cycles / seconds * 1e-9,
              kSms * 2.0 * kBlocks * kRows * kTiles * kRows * 128 / seconds * 1e-12);
}

// Tokens and weights as quantising leaves them: the largest of 128, or of 128 x 128, normal numbers becomes 448.
uint8_t* make_source() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint8_t> numbers[2];
  for (int i = 0; i < 1 << 16; ++i) {
    for (int w = 0; w < 2; ++w) numbers[w].push_back(__nv_fp8_e4m3(normal(random) * 448.0f / (w ? 4.3f : 2.7f)).__x);
  }
  std::vector<uint8_t> bytes(static_cast<size_t>(kSourceStages) * kStageBytes);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = numbers[i % kStageBytes >= kPlane][random() & 0xffff];
  uint8_t* source;
  CHECK(cudaMalloc(&source, bytes.size()));
  CHECK(cudaMemcpy(source, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  return source;
}

}  // namespace

int main() {
  const uint8_t* source = make_source();
  time_product<false, false>(source);
  time_product<false, true>(source);
  time_product<true, false>(source);
  time_product<true, true>(source);
  return 0;
}
