// What the pipes of one SM do beside each other: multiplies of swapAB's shape, with A from registers or from shared
// memory, beside warps that do nothing but one kind of instruction; and multiplies of the normal orientation's shape
// whose sums are promoted, by several kinds of instructions, by two warpgroups that are left alone or take turns.
// docs/log/formats.md, "Two CTAs on an SM", has the first, docs/log/many-tokens.md, "Warpgroups in step", the second.
//   build/pipes
#include <cuda_runtime.h>

#include <cstdio>
#include <type_traits>

#include "common/ptx/memory_order.cuh"
#include "common/ptx/warp.cuh"
#include "common/wgmma.cuh"
#include "timing.h"

namespace {

using namespace megamoe;

constexpr int kWarpgroups = 4, kThreads = kWarpgroups * 128, kSharedBytes = 96 * 1024;
constexpr int kTileBytes = 64 * 128;  // A of one K block, or more than B has
constexpr long long kCycles = 200000;
constexpr int kRepeats = 8, kInstructions = 32;  // of a kind, between two looks at the clock: repeats of so many

enum class Work { kNone, kFromRegisters, kFromShared, kPrmt, kImad, kFfma, kFmul, kFadd, kLds };
__host__ __device__ constexpr bool multiplies(Work work) {
  return work == Work::kFromRegisters || work == Work::kFromShared;
}
constexpr const char* kNames[] = {"",     "A from registers", "A from shared memory", "PRMT", "IMAD", "FFMA", "FMUL",
                                  "FADD", "LDS.128"};

__device__ void clear(uint8_t* shared) {
  for (int i = threadIdx.x; i < kSharedBytes / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(shared)[i] = 0;
  ptx::fence_proxy_async_shared();
  __syncthreads();
}

// K blocks, one after the other, until `end`; returns how many.
template <int kN, Work kWork>
__device__ long long multiply(uint8_t* shared, long long end, float* sink) {
  const int warpgroup = threadIdx.x / 128;
  const wgmma::Descriptor a(shared + warpgroup * kTileBytes), b(shared + (kWarpgroups + warpgroup) * kTileBytes);
  float sums[kN / 2] = {};
  uint32_t fragments[4][4] = {};
  long long blocks = 0;
  while (clock64() < end) {
#pragma unroll 1
    for (int r = 0; r < kRepeats; ++r, ++blocks) {
      wgmma::pin(sums);
      wgmma::pin(fragments);
      wgmma::fence();
      if constexpr (kWork == Work::kFromRegisters) {
        wgmma::multiply_block<kN, 4>(sums, fragments, b, 0);
      } else {
        wgmma::multiply_block<kN, 4>(sums, a, 0, b, 0);
      }
      wgmma::commit();
      wgmma::wait<0>();
      wgmma::pin(sums);
      wgmma::pin(fragments);
    }
  }
  if (sums[0] == 1.0f) *sink = sums[0];  // never
  return blocks;
}

// Instructions of one kind, eight chains of them, until `end`; returns how many.
template <Work kWork>
__device__ long long compute(uint8_t* shared, long long end, float* sink) {
  uint32_t v[8];
  float f[8];
  uint4 loaded = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = threadIdx.x + i, f[i] = v[i];
  long long count = 0;
  while (clock64() < end) {
#pragma unroll 1
    for (int r = 0; r < kRepeats; ++r, count += kInstructions) {
#pragma unroll
      for (int i = 0; i < kInstructions; ++i) {
        uint32_t &x = v[i % 8], y = v[(i + 1) % 8];
        if constexpr (kWork == Work::kPrmt) asm volatile("prmt.b32 %0, %0, %1, 0x3021;" : "+r"(x) : "r"(y));
        if constexpr (kWork == Work::kImad) asm volatile("mad.lo.u32 %0, %0, %1, %0;" : "+r"(x) : "r"(y));
        if constexpr (kWork == Work::kFfma) {
          asm volatile("fma.rn.f32 %0, %0, %1, %0;" : "+f"(f[i % 8]) : "f"(f[(i + 1) % 8]));
        }
        if constexpr (kWork == Work::kFmul)
          asm volatile("mul.rn.f32 %0, %0, %1;" : "+f"(f[i % 8]) : "f"(f[(i + 1) % 8]));
        if constexpr (kWork == Work::kFadd)
          asm volatile("add.rn.f32 %0, %0, %1;" : "+f"(f[i % 8]) : "f"(f[(i + 1) % 8]));
        if constexpr (kWork == Work::kLds) {
          asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                       : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
                       : "r"(ptx::smem_address(shared + threadIdx.x % 128 * 16 + i % 8 * 2048)));
        }
      }
    }
  }
  float all = loaded.x;
  for (int i = 0; i < 8; ++i) all += v[i] + f[i];
  if (all == 1.5f) *sink = all;  // never
  return count;
}

// Of the kinds, the one that is `mine`.
template <int kN, Work... kWorks>
__device__ long long work(Work mine, uint8_t* shared, long long end, float* sink) {
  long long count = 0;
  const auto one = [&](auto kind) {
    if (mine != kind.value) return;
    if constexpr (multiplies(kind.value)) {
      count = multiply<kN, kind.value>(shared, end, sink);
    } else {
      count = compute<kind.value>(shared, end, sink);
    }
  };
  (one(std::integral_constant<Work, kWorks>()), ...);
  return count;
}

// Each warpgroup does its work; out: how much of it in kCycles.
template <int kN>
__global__ void __launch_bounds__(kThreads, 1) beside(int4 works, long long* counts, float* sink) {
  extern __shared__ __align__(1024) uint8_t shared[];
  clear(shared);
  const int warpgroup = threadIdx.x / 128;
  const int mine = warpgroup == 0 ? works.x : warpgroup == 1 ? works.y : warpgroup == 2 ? works.z : works.w;
  const long long end = clock64() + kCycles;
  const Work kind = static_cast<Work>(__shfl_sync(~0u, mine, 0));  // the same in all lanes, as ptxas can see
  const long long count = work<kN, Work::kFromRegisters, Work::kFromShared, Work::kPrmt, Work::kImad, Work::kFfma,
                               Work::kFmul, Work::kFadd, Work::kLds>(kind, shared, end, sink);
  if (threadIdx.x % 128 == 0) counts[warpgroup] = count;
}

template <int kN>
void run_beside(long long* counts, float* sink) {
  constexpr Work kMultiplies[] = {Work::kFromRegisters, Work::kFromShared};
  constexpr Work kOthers[] = {Work::kNone, Work::kPrmt, Work::kImad, Work::kFfma, Work::kFmul, Work::kFadd, Work::kLds};
  auto run = [&](Work first, Work second) {
    const int a = static_cast<int>(first), b = static_cast<int>(second);
    beside<kN><<<1, kThreads, kSharedBytes>>>(int4{a, a, b, b}, counts, sink);
    CHECK(cudaDeviceSynchronize());
    std::printf("N %2d, two warpgroups:", kN);
    for (int warpgroup : {0, 2}) {
      const Work work = warpgroup == 0 ? first : second;
      if (work == Work::kNone) continue;
      const char* unit = multiplies(work) ? "a K block" : "an instruction";
      std::printf("  %s %.1f cycles %s", kNames[static_cast<int>(work)],
                  static_cast<double>(kCycles) / counts[warpgroup], unit);
    }
    std::printf("\n");
  };
  CHECK(cudaFuncSetAttribute(beside<kN>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  for (Work multiply : kMultiplies) {
    run(multiply, multiply);
    for (Work other : kOthers) run(multiply, other);
  }
  for (Work other : kOthers) {
    if (other != Work::kNone) run(other, Work::kNone);
  }
}

// The normal orientation: 64 x 256 sums a warpgroup, promoted after each half of 128.
enum class Promotion { kNone, kFfma, kFmulAndFadd, kFadd };
constexpr const char* kPromotions[] = {"none", "FFMA", "FMUL and FADD", "FADD"};
constexpr int kBlocks = 400;
constexpr int kSinkFloats = 1 + 3 * 128;  // and scales, zeros, behind it

// `kTurns`: a warpgroup multiplies once the other's multiplies have been issued.
template <Promotion kPromotion, bool kTurns>
__global__ void __launch_bounds__(2 * 128, 1) promote(const float* scales, long long* cycles, float* sink) {
  extern __shared__ __align__(1024) uint8_t shared[];
  clear(shared);
  const wgmma::Descriptor a(shared + threadIdx.x / 128 * kTileBytes), b(shared + 2 * kTileBytes);
  float sums[2][64] = {}, partial[64] = {};
  const float row_scale[2] = {scales[threadIdx.x], scales[threadIdx.x + 128]};  // of a fragment's two rows
  const uint32_t own_turn = 1 + threadIdx.x / 128, other_turn = 3 - own_turn;   // barriers
  if (kTurns && own_turn == 2) ptx::named_barrier_arrive(other_turn, 2 * 128);
  const long long begin = clock64();
#pragma unroll 1
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      wgmma::pin(partial);
      wgmma::fence();
      if (kTurns) ptx::named_barrier_sync(own_turn, 2 * 128);
      wgmma::multiply_block<128, 4>(partial, a, 0, b, half * 2 * kTileBytes);
      wgmma::commit();
      if (kTurns) ptx::named_barrier_arrive(other_turn, 2 * 128);
      wgmma::wait<0>();
      wgmma::pin(partial);
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        float& sum = sums[half][i];
        const float scale = row_scale[i / 2 % 2];
        if constexpr (kPromotion == Promotion::kFfma) sum = fmaf(scale, partial[i], sum);
        if constexpr (kPromotion == Promotion::kFmulAndFadd) sum = __fadd_rn(sum, __fmul_rn(scale, partial[i]));
        if (kPromotion == Promotion::kFadd || i == 0) sum += partial[i];  // one always, or ptxas drops the multiplies
        asm volatile("" : "+f"(sum));
      }
    }
  }
  if (kTurns && own_turn == 1) ptx::named_barrier_sync(own_turn, 2 * 128);
  if (threadIdx.x == 0) *cycles = clock64() - begin;
  float all = 0.0f;
  for (int i = 0; i < 64; ++i) all += sums[0][i] + sums[1][i];
  if (all == 1.5f) *sink = all;  // never
}

template <Promotion kPromotion, bool kTurns>
double cycles_of_block(long long* cycles, float* sink) {
  CHECK(cudaFuncSetAttribute(promote<kPromotion, kTurns>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  promote<kPromotion, kTurns><<<1, 2 * 128, kSharedBytes>>>(sink + 1, cycles, sink);
  CHECK(cudaDeviceSynchronize());
  return static_cast<double>(*cycles) / kBlocks;
}

template <Promotion kPromotion>
void run_promotion(long long* cycles, float* sink) {
  constexpr int kTensorCycles = 2 * 512;  // of two warpgroups' multiplies, at the tensor cores' rate
  std::printf("64 x 256 and K 128 for each of two warpgroups, promotion by %s: %.0f cycles, in turns %.0f, of %d\n",
              kPromotions[static_cast<int>(kPromotion)], cycles_of_block<kPromotion, false>(cycles, sink),
              cycles_of_block<kPromotion, true>(cycles, sink), kTensorCycles);
}

}  // namespace

int main() {
  long long* counts;
  float* sink;
  CHECK(cudaMallocManaged(&counts, kWarpgroups * sizeof(long long)));
  CHECK(cudaMalloc(&sink, kSinkFloats * sizeof(float)));
  CHECK(cudaMemset(sink, 0, kSinkFloats * sizeof(float)));
  run_beside<8>(counts, sink);
  run_beside<56>(counts, sink);
  run_promotion<Promotion::kNone>(counts, sink);
  run_promotion<Promotion::kFfma>(counts, sink);
  run_promotion<Promotion::kFmulAndFadd>(counts, sink);
  run_promotion<Promotion::kFadd>(counts, sink);
  return 0;
}
