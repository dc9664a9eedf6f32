// MXFP4 weights from a stage to registers: of WGMMA's A operand in swapAB, of the decoders in the normal orientation.
//
// A plane (jax_megamoe/weight_layout.py) has the words of a thread side by side, each with eight weights of one row and
// group: one fragment word's four in the low half, another's in the high half. A nibble's low three bits are the code of
// the magnitude, its high bit the sign of another weight, placed so that one mask, or a shift and a mask, brings four
// signs to where an FP8 word has them. A byte permute looks four magnitudes up at once in the table of the row's group,
// E5M2 numbers: 2^(d - 13) times 0, 0.5, 1, 1.5, 2, 3, 4, 6, all normal and exact for d of 0 to 26. A group of zeros may
// have any d: the number zero stays zero.
#pragma once

#include <cstdint>

#include "common/wgmma.cuh"
#include "kernels/roles.h"
#include "layout/weight_format.h"

namespace megamoe {

// Numbers that tables are made with. ptxas moves each to a register again in every iteration of a loop, which takes six
// instructions of some 270, but for those of `in_registers`, which keep theirs.
struct E2m1Constants {
  uint32_t low = 0x04040400u, high = 0x04040404u;
  uint32_t byte[4] = {1u, 1u << 8, 1u << 16, 1u << 24};

  __device__ __forceinline__ static E2m1Constants in_registers() {
    E2m1Constants constants;
    keep(constants.low);
    keep(constants.high);
#pragma unroll
    for (uint32_t& one : constants.byte) keep(one);
    return constants;
  }

 private:
  // What comes out of a shuffle, ptxas does not know.
  __device__ __forceinline__ static void keep(uint32_t& value) { value = __shfl_sync(~0u, value, 0); }
};

// The eight magnitudes of a group.
class E2m1Table {
 public:
  // Of a group: its d is byte number `group`.
  __device__ __forceinline__ E2m1Table(uint32_t exponents, int group, const E2m1Constants& constants) {
    const uint32_t d = __dp4a(exponents, constants.byte[group], 0u);
    low_ = d * constants.low + 0x0a080400u;
    high_ = d * constants.high + 0x12100e0cu;
  }

  // The eight weights of a word.
  __device__ __forceinline__ void decode(uint32_t word, uint32_t& first, uint32_t& second) const {
    constexpr uint32_t kSigns = 0x80808080u;
    const uint32_t codes = word & 0x77777777u;
    first = look_up(codes) | (word & kSigns);
    second = look_up(upper_half(codes)) | (word << 4 & kSigns);
  }

 private:
  __device__ __forceinline__ uint32_t look_up(uint32_t codes) const {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low_), "r"(high_), "r"(codes));
    return bytes;
  }

  // Its low half is the high half of `codes`, which is a finite FP16 number: times one, subnormal or not, it stays itself.
  __device__ __forceinline__ static uint32_t upper_half(uint32_t codes) {
    uint32_t one, upper;
    asm volatile("mov.b32 %0, 0x3c003c00;" : "=r"(one));
    asm("{\n.reg .b16 low, high;\n.reg .b32 both;\nmov.b32 {low, high}, %1;\nmov.b32 both, {high, high};\n"
        "mul.rn.f16x2 %0, both, %2;\n}\n"
        : "=r"(upper)
        : "r"(codes), "r"(one));
    return upper;
  }

  uint32_t low_, high_;
};

// What a thread reads of half of a plane's columns: words of its two rows, each in one group.
class E2m1Words {
 public:
  __device__ __forceinline__ E2m1Words(const uint8_t* plane, int half)
      : E2m1Words(plane, half, load_exponents(plane)) {}
  // `exponents`: of the first half's low and high row, and the second's.
  __device__ __forceinline__ E2m1Words(const uint8_t* plane, int half, uint32_t exponents)
      : words_(*reinterpret_cast<const uint4*>(plane + half * (Mxfp4::kCodeBytes / 2) + thread() * sizeof(uint4))),
        exponents_(exponents) {}
  __device__ __forceinline__ static uint32_t load_exponents(const uint8_t* plane) {
    return *reinterpret_cast<const uint32_t*>(plane + Mxfp4::kCodeBytes + thread() / 2 * sizeof(uint32_t));
  }

  // The A operand of two instructions.
  __device__ __forceinline__ void decode(int half, uint32_t (&first)[4], uint32_t (&second)[4],
                                         const E2m1Constants& constants) const {
    const E2m1Table low(exponents_, 2 * half, constants), high(exponents_, 2 * half + 1, constants);
    low.decode(words_.x, first[0], first[2]);
    high.decode(words_.y, first[1], first[3]);
    low.decode(words_.z, second[0], second[2]);
    high.decode(words_.w, second[1], second[3]);
  }

 private:
  __device__ static int thread() { return threadIdx.x % kWarpgroupThreads; }

  uint4 words_;
  uint32_t exponents_;
};

// ... of a plane.
class E2m1PlaneWords {
 public:
  __device__ __forceinline__ explicit E2m1PlaneWords(const uint8_t* plane)
      : E2m1PlaneWords(plane, E2m1Words::load_exponents(plane)) {}

  // The A operand of the plane's four instructions.
  __device__ __forceinline__ void decode(uint32_t (&fragments)[4][4],
                                         const E2m1Constants& constants = E2m1Constants()) const {
    first_.decode(0, fragments[0], fragments[1], constants);
    second_.decode(1, fragments[2], fragments[3], constants);
    wgmma::pin(fragments);  // here, and not where they are needed
  }

 private:
  __device__ __forceinline__ E2m1PlaneWords(const uint8_t* plane, uint32_t exponents)
      : first_(plane, 0, exponents), second_(plane, 1, exponents) {}

  E2m1Words first_, second_;
};

}  // namespace megamoe
