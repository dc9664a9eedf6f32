// The swapAB path of the kernel in one page: an FP8 product of many weight rows with a few tokens, at the speed of the
// memory. What the real kernel adds is in docs/how-it-works.md: routing, three matrices, activations, several GPUs.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I jax_megamoe/cuda examples/teaching/swap_ab.cu -o swap_ab
//   ./swap_ab
//
//   result[t][r] = sum over K blocks b of  weight_scale[r / 128][b] * token_scale[t][b] * (weights[r] . tokens[t])_b
//
// Weights f8[rows, K] lie in memory as shared memory wants them (`packed`): a unit is 128 rows, a K block 128 columns,
// and a unit's K block is 16 KB in one piece, two planes of 64 rows. Tokens f8[16, K] lie likewise, a plane for each
// K block. In a plane, row r has its 16-byte piece c at place c ^ (r % 8): the 128-byte swizzle of WGMMA.
#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "common/bounded_wait.cuh"
#include "common/ptx/bulk_copy.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/warp.cuh"
#include "common/wgmma.cuh"

using namespace megamoe;

constexpr int kTokens = 16, kBlock = 128, kPlaneRows = 64, kUnitRows = 2 * kPlaneRows;
constexpr int kPlaneBytes = kPlaneRows * kBlock, kWeightBytes = 2 * kPlaneBytes, kTokenBytes = kTokens * kBlock;
constexpr int kStages = 6;         // 96 KB of weights on their way: what an H200 needs, and no more
constexpr int kConsumerWarps = 8;  // two warpgroups, one for each plane of a unit
constexpr int kThreads = 32 * kConsumerWarps + 32;
constexpr int kOver = -1;  // the note that ends the work of a block

struct Stage {
  alignas(1024) uint8_t weights[kWeightBytes];  // WGMMA wants planes on multiples of 1024 bytes
  alignas(1024) uint8_t tokens[kTokenBytes];
};

struct Shared {
  Stage stages[kStages];
  uint64_t full[kStages], empty[kStages];
  int note[kStages];  // which unit a stage is of
};

struct Problem {
  const uint8_t *weights, *tokens;          // as packed
  const float *weight_scale, *token_scale;  // [units, blocks], [kTokens, blocks]
  float* result;                            // [kTokens, rows]
  int units, blocks;
  int* next_ticket;
};

// Where a thread is in the ring. Every other time round, a barrier's phase has the other parity.
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// One thread. It only issues copies: the memory has to be busy all the time, whatever the consumers do.
__device__ void produce(const Problem& problem, Shared& shared) {
  Cursor at;
  // The first unit is the block's own. A block that is late draws fewer of the others.
  for (int unit = blockIdx.x;; unit = gridDim.x + atomicAdd(problem.next_ticket, 1)) {
    const bool over = unit >= problem.units;
    for (int block = 0; block < (over ? 1 : problem.blocks); ++block, at.advance()) {
      uint64_t* full = &shared.full[at.stage];
      await(&shared.empty[at.stage], at.parity ^ 1);  // in the first round there is nothing to wait for
      shared.note[at.stage] = over ? kOver : unit;
      if (over) return ptx::mbarrier_arrive(full);
      ptx::mbarrier_arrive_expect_tx(full, kWeightBytes + kTokenBytes);
      // Weights are read once and leave the L2 first. Tokens are read by every unit and stay.
      const size_t piece = static_cast<size_t>(unit) * problem.blocks + block;
      ptx::bulk_stream_global_to_shared(shared.stages[at.stage].weights, problem.weights + piece * kWeightBytes,
                                        kWeightBytes, full);
      ptx::bulk_copy_global_to_shared(shared.stages[at.stage].tokens, problem.tokens + block * kTokenBytes, kTokenBytes,
                                      full);
    }
  }
}

// A warpgroup: 64 rows of weights on the M dimension of WGMMA, the tokens on N. Hence swapAB: tokens would fill a
// quarter of M. A thread has kTokens / 2 of the 64 x kTokens sums.
__device__ void consume(const Problem& problem, Shared& shared) {
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  Cursor at;
  while (true) {
    await(&shared.full[at.stage], at.parity);
    const int unit = shared.note[at.stage];
    if (unit == kOver) return;
    float sums[kTokens / 2] = {};
    for (int block = 0; block < problem.blocks; ++block, at.advance()) {
      await(&shared.full[at.stage], at.parity);
      const wgmma::Descriptor weights(shared.stages[at.stage].weights + warpgroup * kPlaneBytes);
      const wgmma::Descriptor tokens(shared.stages[at.stage].tokens);
      float partial[kTokens / 2];
      wgmma::pin(partial);
      wgmma::fence();
      for (int k = 0; k < kBlock; k += wgmma::kInstructionK) {
        wgmma::Multiply<kTokens>::run(partial, weights.at(k), tokens.at(k), k > 0);
      }
      wgmma::commit();
      wgmma::wait<0>();  // the real kernel has two partial sums, and multiplies one while it promotes the other
      wgmma::pin(partial);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&shared.empty[at.stage]);
      // Promotion: the tensor cores add FP8 products with fewer bits than FP32, so that no sum there is longer than
      // a block.
      const float scale = problem.weight_scale[unit * problem.blocks + block];
      for (int i = 0; i < kTokens / 2; ++i) {
        const int token = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        sums[i] += partial[i] * (scale * problem.token_scale[token * problem.blocks + block]);
      }
    }
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      const int row = unit * kUnitRows + warpgroup * kPlaneRows + 16 * warp + lane / 4 + 8 * (i / 2 % 2);
      problem.result[static_cast<size_t>(token) * problem.units * kUnitRows + row] = sums[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) swap_ab(const __grid_constant__ Problem problem) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], kConsumerWarps);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x / 32 < kConsumerWarps) {
    consume(problem, shared);
  } else if (ptx::elect_one()) {
    produce(problem, shared);
  }
}

// ---- the host's part

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* on_device(const std::vector<T>& values) {
  T* copy;
  check(cudaMalloc(&copy, values.size() * sizeof(T)));
  check(cudaMemcpy(copy, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return copy;
}

// f8[rows, K] into planes of `plane_rows` rows and 128 columns; those of the same `unit_rows` rows and columns lie
// together.
std::vector<uint8_t> packed(const std::vector<uint8_t>& matrix, int columns, int unit_rows, int plane_rows) {
  std::vector<uint8_t> planes(matrix.size());
  for (size_t i = 0; i < matrix.size(); ++i) {
    const size_t row = i / columns, column = i % columns, blocks = columns / kBlock;
    const size_t piece = row / unit_rows * blocks + column / kBlock, r = row % plane_rows, c = column % kBlock;
    const size_t place = (c / 16 ^ r % 8) * 16 + c % 16;
    planes[(piece * unit_rows + row % unit_rows / plane_rows * plane_rows + r) * kBlock + place] = matrix[i];
  }
  return planes;
}

float decoded(uint8_t value) {
  __nv_fp8_e4m3 number;
  number.__x = value;
  return static_cast<float>(number);
}

int main() {
  constexpr int kUnits = 264, kColumns = 4096, kBlocks = kColumns / kBlock, kRows = kUnits * kUnitRows, kRuns = 50;
  std::mt19937 random(0);
  const auto bytes = [&](size_t count) {
    std::vector<uint8_t> values(count);
    for (uint8_t& value : values) value = random() & 0xbf;  // of both signs, below 2: never NaN
    return values;
  };
  const auto scales = [&](size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = 0.5f + (random() & 0xffff) / 65536.0f;
    return values;
  };
  const auto weights = bytes(size_t{kRows} * kColumns), tokens = bytes(kTokens * kColumns);
  const auto weight_scale = scales(kUnits * kBlocks), token_scale = scales(kTokens * kBlocks);
  int num_sms;
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  const Problem problem{on_device(packed(weights, kColumns, kUnitRows, kPlaneRows)),
                        on_device(packed(tokens, kColumns, kTokens, kTokens)),
                        on_device(weight_scale),
                        on_device(token_scale),
                        on_device(std::vector<float>(size_t{kTokens} * kRows)),
                        kUnits,
                        kBlocks,
                        on_device(std::vector<int>{0})};
  check(cudaFuncSetAttribute(swap_ab, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (int run = 0; run < kRuns; ++run) {
    if (run == 1) check(cudaEventRecord(begin));
    check(cudaMemsetAsync(problem.next_ticket, 0, sizeof(int)));
    swap_ab<<<num_sms, kThreads, sizeof(Shared)>>>(problem);
  }
  check(cudaEventRecord(end));
  check(cudaDeviceSynchronize());
  float milliseconds;
  check(cudaEventElapsedTime(&milliseconds, begin, end));

  std::vector<float> result(size_t{kTokens} * kRows);
  check(cudaMemcpy(result.data(), problem.result, result.size() * sizeof(float), cudaMemcpyDeviceToHost));
  double worst = 0, largest = 0;
  for (int row = 0; row < kRows; row += 61) {
    for (int token = 0; token < kTokens; ++token) {
      double wanted = 0;
      for (int block = 0; block < kBlocks; ++block) {
        double product = 0;
        for (int k = block * kBlock; k < (block + 1) * kBlock; ++k) {
          product += decoded(weights[size_t(row) * kColumns + k]) * decoded(tokens[token * kColumns + k]);
        }
        wanted += product * weight_scale[row / kUnitRows * kBlocks + block] * token_scale[token * kBlocks + block];
      }
      worst = std::fmax(worst, std::fabs(result[size_t(token) * kRows + row] - wanted));
      largest = std::fmax(largest, std::fabs(wanted));
    }
  }
  const double microseconds = 1000.0 * milliseconds / (kRuns - 1);
  std::printf("%.1f us, %.0f GB/s of weights, worst error %.1e of the largest result\n", microseconds,
              double(kRows) * kColumns / microseconds / 1000, worst / largest);
  return worst < 1e-3 * largest ? 0 : 1;  // a block's sum in the tensor cores has some 13 bits
}
