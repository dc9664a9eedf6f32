// MXFP4 weights from a stage to the registers of WGMMA's A operand.
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

// The eight magnitudes of a group.
class E2m1Table {
 public:
  // `exponents`: the d of a row's four groups.
  __device__ __forceinline__ E2m1Table(uint32_t exponents, int group) {
    const uint32_t d = __dp4a(exponents, 1u << 8 * group, 0u);
    low_ = d * 0x04040400u + 0x0a080400u;
    high_ = d * 0x04040404u + 0x12100e0cu;
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

// What a thread reads of a plane: the words of its two rows.
class E2m1Words {
 public:
  __device__ __forceinline__ explicit E2m1Words(const uint8_t* plane) {
    const int thread = threadIdx.x % kWarpgroupThreads;
    exponents_ = *reinterpret_cast<const uint2*>(plane + Mxfp4::kCodeBytes + thread / 4 * sizeof(uint2));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      words_[half] = *reinterpret_cast<const uint4*>(plane + half * (Mxfp4::kCodeBytes / 2) + thread * sizeof(uint4));
    }
  }

  // The A operand of the plane's four instructions.
  __device__ __forceinline__ void decode(uint32_t (&fragments)[4][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      decode_group(words_[half].x, words_[half].y, 2 * half, fragments[2 * half]);
      decode_group(words_[half].z, words_[half].w, 2 * half + 1, fragments[2 * half + 1]);
    }
    wgmma::pin(fragments);  // here, and not where they are needed
  }

 private:
  // Of the low and of the high row.
  __device__ __forceinline__ void decode_group(uint32_t low, uint32_t high, int group, uint32_t (&fragment)[4]) const {
    E2m1Table(exponents_.x, group).decode(low, fragment[0], fragment[2]);
    E2m1Table(exponents_.y, group).decode(high, fragment[1], fragment[3]);
  }

  uint4 words_[2];
  uint2 exponents_;
};

}  // namespace megamoe
