// FP8 (-> FP32) warpgroup matrix multiply: B, and A unless it comes from registers, in 128-byte-swizzled, K-major shared
// memory.
#pragma once

#include <cstdint>

#include "common/ptx/address.cuh"
#include "common/ptx/warp.cuh"

namespace megamoe::wgmma {

// Bytes of K that one instruction consumes.
constexpr int kInstructionK = 32;

// Shared-memory matrix descriptor of a K-major tile stored as rows of 128 bytes in the 128-byte swizzle: groups of
// eight rows are 1024 bytes apart. The tile starts on a multiple of 1024 bytes; stepping along K inside the 128-byte
// row adds the plain byte offset, because the hardware swizzles the final address. Only the address, the low word,
// differs between tiles.
struct Descriptor {
  uint32_t low;

  __device__ __forceinline__ explicit Descriptor(const void* tile) : Descriptor(low_word(tile)) {}
  // Of what `low_word` made earlier: all that is left to do is to take it to a uniform register.
  __device__ __forceinline__ explicit Descriptor(uint32_t low_word) : low(ptx::uniform(low_word)) {}
  __device__ __forceinline__ static uint32_t low_word(const void* tile) {
    uint32_t word = (ptx::smem_address(tile) & 0x3ffff) >> 4 | kLeadingUnused;
    asm volatile("" : "+r"(word));  // here, and not where it is used
    return word;
  }

  // Of the tile `bytes` further on. Worked out once, where they are no constant: `at` would do so for each multiply.
  __device__ __forceinline__ Descriptor further(uint32_t bytes) const { return Descriptor(low + (bytes >> 4)); }
  // The tile `bytes` further on.
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const {
    constexpr uint32_t kSwizzle128 = 1u << 30;
    constexpr uint32_t kStride = 1024 >> 4;
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low + (bytes >> 4)), "r"(kSwizzle128 | kStride));
    return descriptor;
  }

 private:
  static constexpr uint32_t kLeadingUnused = 1u << 16;
};

// Orders register and shared-memory accesses of the warpgroup before its next multiplies.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across the asynchronous multiplies that write it.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// D[64 x kN] (+)= A[64 x 32] * B[kN x 32]^T. Thread (warp w, lane l) holds D[16w + l/4 + 8*(i/2 % 2)][8*(i/4) + 2*(l%4)
// + i%2] in d[i]. `accumulate` false overwrites D.
//
// A is E4M3 in shared memory, and B E4M3 or, if `kE5m2`, E5M2. Or A is E5M2 in registers, and B E4M3: word j of a thread
// holds row 16w + l/4 + 8*(j%2), K 16*(j/2) + 4*(l%4) and the three after it.
template <int kN>
struct Multiply;

#define MEGAMOE_F4(b) "+f"(d[b]), "+f"(d[b + 1]), "+f"(d[b + 2]), "+f"(d[b + 3])
#define MEGAMOE_F8(b) MEGAMOE_F4(b), MEGAMOE_F4(b + 4)
#define MEGAMOE_F16(b) MEGAMOE_F8(b), MEGAMOE_F8(b + 8)
#define MEGAMOE_F32(b) MEGAMOE_F16(b), MEGAMOE_F16(b + 16)
// clang-format off
// D's registers as text, by N.
#define MEGAMOE_D8 "%0, %1, %2, %3"
#define MEGAMOE_D16 MEGAMOE_D8 ", %4, %5, %6, %7"
#define MEGAMOE_D24 MEGAMOE_D16 ", %8, %9, %10, %11"
#define MEGAMOE_D32 MEGAMOE_D24 ", %12, %13, %14, %15"
#define MEGAMOE_D40 MEGAMOE_D32 ", %16, %17, %18, %19"
#define MEGAMOE_D48 MEGAMOE_D40 ", %20, %21, %22, %23"
#define MEGAMOE_D56 MEGAMOE_D48 ", %24, %25, %26, %27"
#define MEGAMOE_D64 MEGAMOE_D56 ", %28, %29, %30, %31"
#define MEGAMOE_D128 MEGAMOE_D64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39" \
  ", %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55" \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
// clang-format on
#define MEGAMOE_MULTIPLY(N, TYPES, A, B, FLAG)                                                           \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " FLAG ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k32.f32." TYPES \
  " {" MEGAMOE_D##N "}, " A ", " B ", p, 1, 1;\n}\n"
// Arguments: N, and the six operands after D's as text.
#define MEGAMOE_DEFINE_MULTIPLY(N, P0, P1, P2, P3, P4, P5, ...)                                                     \
  template <>                                                                                                       \
  struct Multiply<N> {                                                                                              \
    template <bool kE5m2 = false>                                                                                   \
    __device__ __forceinline__ static void run(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {         \
      if constexpr (kE5m2) {                                                                                        \
        asm volatile(MEGAMOE_MULTIPLY(N, "e4m3.e5m2", P0, P1, P2) : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate)); \
      } else {                                                                                                      \
        asm volatile(MEGAMOE_MULTIPLY(N, "e4m3.e4m3", P0, P1, P2) : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate)); \
      }                                                                                                             \
    }                                                                                                               \
    __device__ __forceinline__ static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,               \
                                               int accumulate) {                                                    \
      asm volatile(MEGAMOE_MULTIPLY(N, "e5m2.e4m3", "{" P0 ", " P1 ", " P2 ", " P3 "}", P4, P5)                     \
                   : __VA_ARGS__                                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                          \
    }                                                                                                               \
  }

// clang-format off
MEGAMOE_DEFINE_MULTIPLY(8, "%4", "%5", "%6", "%7", "%8", "%9", MEGAMOE_F4(0));
MEGAMOE_DEFINE_MULTIPLY(16, "%8", "%9", "%10", "%11", "%12", "%13", MEGAMOE_F8(0));
MEGAMOE_DEFINE_MULTIPLY(24, "%12", "%13", "%14", "%15", "%16", "%17", MEGAMOE_F8(0), MEGAMOE_F4(8));
MEGAMOE_DEFINE_MULTIPLY(32, "%16", "%17", "%18", "%19", "%20", "%21", MEGAMOE_F16(0));
MEGAMOE_DEFINE_MULTIPLY(40, "%20", "%21", "%22", "%23", "%24", "%25", MEGAMOE_F16(0), MEGAMOE_F4(16));
MEGAMOE_DEFINE_MULTIPLY(48, "%24", "%25", "%26", "%27", "%28", "%29", MEGAMOE_F16(0), MEGAMOE_F8(16));
MEGAMOE_DEFINE_MULTIPLY(56, "%28", "%29", "%30", "%31", "%32", "%33", MEGAMOE_F16(0), MEGAMOE_F8(16), MEGAMOE_F4(24));
MEGAMOE_DEFINE_MULTIPLY(128, "%64", "%65", "%66", "%67", "%68", "%69", MEGAMOE_F32(0), MEGAMOE_F32(32));
// clang-format on

#undef MEGAMOE_DEFINE_MULTIPLY
#undef MEGAMOE_MULTIPLY
#undef MEGAMOE_D128
#undef MEGAMOE_D64
#undef MEGAMOE_D56
#undef MEGAMOE_D48
#undef MEGAMOE_D40
#undef MEGAMOE_D32
#undef MEGAMOE_D24
#undef MEGAMOE_D16
#undef MEGAMOE_D8
#undef MEGAMOE_F32
#undef MEGAMOE_F16
#undef MEGAMOE_F8
#undef MEGAMOE_F4

// The same for the words of an A fragment, which the multiplies go on reading.
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
  }
}

// One 128-byte K block (four instructions) or a part of it: `kSteps` instructions starting at K byte `k_begin`.
template <int kN, int kSteps, bool kE5m2 = false>
__device__ __forceinline__ void multiply_block(float (&d)[kN / 2], Descriptor a, uint32_t a_offset, Descriptor b,
                                               uint32_t b_offset) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Multiply<kN>::template run<kE5m2>(d, a.at(a_offset + step * kInstructionK), b.at(b_offset + step * kInstructionK),
                                      step != 0);
  }
}

// The same with A from registers, an instruction's after the other. `adds`: to what D has.
template <int kN, int kSteps>
__device__ __forceinline__ void multiply_block(float (&d)[kN / 2], const uint32_t (*a)[4], Descriptor b,
                                               uint32_t b_offset, bool adds = false) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Multiply<kN>::run(d, a[step], b.at(b_offset + step * kInstructionK), adds || step != 0);
  }
}

}  // namespace megamoe::wgmma
