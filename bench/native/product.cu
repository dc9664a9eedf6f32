// What a large FP8 matrix product with a promotion per K block reaches, in the normal path's shape: 128 tokens x 256
// weight rows a CTA, 64 x 256 a warpgroup. `resident` multiplies what lies in shared memory, `L2` has every K block
// brought from the L2, as the fused kernel does. Long enough for the clock to settle at the power limit.
#define MEGAMOE_OUTLINE_TRAPS  // common/bounded_wait.cuh says why
#include <cuda_fp8.h>

#include <random>

#include "common/bounded_wait.cuh"
#include "common/ptx/bulk_copy.cuh"
#include "common/ptx/memory_order.cuh"
#include "common/ptx/registers.cuh"
#include "common/wgmma.cuh"
#include "kernels/ring.cuh"
#include "timing.h"

namespace {

using namespace megamoe;

using O = Normal<Fp8Block>;
constexpr int kTiles = O::kUnitTiles, kStages = 4;
constexpr int kTokenBytes = kNormalTokenTile * kBlockK, kStageBytes = kTokenBytes + O::kStageWeightBytes;
constexpr int kTileRows = 2 * kPlaneRows;
constexpr int kBlocks = 4000, kSourceStages = 512;

template <bool kFromL2>
__global__ void __launch_bounds__(kCtaThreads, 1) product(const uint8_t* source, long long* cycles, float* sink) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t full[kStages], empty[kStages];
  __shared__ float scales[kNormalTokenTile + 2 * kTiles];
  for (int i = threadIdx.x; i < kStages * kStageBytes / 16; i += blockDim.x) {
    reinterpret_cast<uint4*>(shared)[i] = reinterpret_cast<const uint4*>(source)[i];
  }
  for (int i = threadIdx.x; i < kNormalTokenTile + 2 * kTiles; i += blockDim.x) scales[i] = 1.0f / (i + 1000);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) ptx::mbarrier_init(&full[s], 1), ptx::mbarrier_init(&empty[s], kConsumerWarps);
    ptx::mbarrier_init_fence();
  }
  ptx::fence_proxy_async_shared();
  __syncthreads();
  StageCursor cursor;
  if (threadIdx.x >= kConsumerThreads) {
    ptx::decrease_registers<O::kProducerRegisters>();
    if (threadIdx.x != kConsumerThreads) return;
    for (int b = 0; b < kBlocks; ++b, cursor.advance(kStages)) {
      const int stage = cursor.stage;
      megamoe::await(&empty[stage], cursor.parity ^ 1);
      if (!kFromL2) {
        ptx::mbarrier_arrive(&full[stage]);
        continue;
      }
      const uint8_t* from = source + static_cast<size_t>((blockIdx.x % 16 * 97 + b) % kSourceStages) * kStageBytes;
      ptx::mbarrier_arrive_expect_tx(&full[stage], kStageBytes);
      for (int o = 0; o < kStageBytes; o += O::kBlockWeightBytes) {
        ptx::bulk_copy_global_to_shared(shared + stage * kStageBytes + o, from + o, O::kBlockWeightBytes, &full[stage]);
      }
    }
    return;
  }
  ptx::increase_registers<O::kConsumerRegisters>();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  float sums[kTiles][kTileRows / 2] = {};
  const long long start = clock64();
#pragma unroll 1
  for (int b = 0; b < kBlocks; ++b, cursor.advance(kStages)) {
    const int stage = cursor.stage;
    const uint8_t* base = shared + stage * kStageBytes;
    const wgmma::Descriptor tokens(base + threadIdx.x / kWarpgroupThreads * kWarpgroupTokens * kBlockK),
        weights(base + kTokenBytes);
    megamoe::await(&full[stage], cursor.parity);
    const float token[2] = {scales[row], scales[row + 8]};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float partial[kTileRows / 2];
      wgmma::pin(partial);
      wgmma::fence();
      wgmma::multiply_block<kTileRows, kBlockK / wgmma::kInstructionK>(partial, tokens, 0, weights,
                                                                       t * O::kBlockWeightBytes);
      wgmma::commit();
      const float* weight_scales = scales + kNormalTokenTile + 2 * t;
      const float even = weight_scales[0], odd = weight_scales[1];
      wgmma::wait<0>();
      wgmma::pin(partial);
      if (t == kTiles - 1) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&empty[stage]);
      }
      const float scale[2][2] = {{token[0] * even, token[1] * even}, {token[0] * odd, token[1] * odd}};
#pragma unroll
      for (int i = 0; i < kTileRows / 2; ++i) sums[t][i] = fmaf(scale[i / 4 % 2][i / 2 % 2], partial[i], sums[t][i]);
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

template <bool kFromL2>
void time_product(const uint8_t* source) {
  constexpr int kWarmUp = 100, kLaunches = 20;
  int sms;
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  auto* kernel = product<kFromL2>;
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
    kernel<<<sms, kCtaThreads, kStages * kStageBytes>>>(source, cycles, sink);
  }
  CHECK(cudaEventRecord(stop));
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  float ms;
  CHECK(cudaEventElapsedTime(&ms, start, stop));
  const double seconds = ms * 1e-3 / kLaunches;
  std::printf("%-8s %6.0f cycles a K block, %.2f GHz, %5.0f TFLOP/s\n", kFromL2 ? "L2" : "resident",
              static_cast<double>(*cycles) / kBlocks, *cycles / seconds * 1e-9,
              sms * 2.0 * kBlocks * kNormalTokenTile * kTiles * kTileRows * kBlockK / seconds * 1e-12);
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
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = numbers[i % kStageBytes >= kTokenBytes][random() & 0xffff];
  uint8_t* source;
  CHECK(cudaMalloc(&source, bytes.size()));
  CHECK(cudaMemcpy(source, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  return source;
}

}  // namespace

int main() {
  const uint8_t* source = make_source();
  time_product<false>(source);
  time_product<true>(source);
  return 0;
}
