// Tile geometry shared by host and device. The weight layout is documented in jax_megamoe/layout.py, its Python twin.
#pragma once

#include <cstdint>

#if __has_include(<cuda_runtime_api.h>)
#include <cuda_runtime_api.h>
#else  // a CPU-only build
#define __host__
#define __device__
#endif

namespace megamoe {

// A plane is 64 rows x 128 bytes of K, stored as the swizzled shared-memory image a WGMMA operand wants.
constexpr int kPlaneRows = 64;
constexpr int kBlockK = 128;
constexpr int kPlaneBytes = kPlaneRows * kBlockK;
// A pipeline stage carries two planes of weights: two row halves of one K block (gate/up), or two K blocks (down).
constexpr int kStageWeightBytes = 2 * kPlaneBytes;
// Weight scales travel with their stage as one 16-byte vector.
constexpr int kStageScaleFloats = 4;
// Intermediate columns per gate/up tile (64 gate rows + 64 up rows), hidden columns per down tile.
constexpr int kGateUpTileColumns = 64;
constexpr int kDownTileColumns = 64;
// Intermediate columns that share one activation scale.
constexpr int kActivationScaleColumns = 64;

// Tokens of one expert that one unit of work multiplies. swapAB puts them on the WGMMA N dimension, the normal orientation
// on M.
constexpr int kSwapTokenTile = 56;  // 64 would spill registers
constexpr int kNormalTokenTile = 128;
// swapAB serves launches of up to this many tokens.
constexpr int kMaxSwapTokens = 128;

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;
constexpr int kMaxTokens = 1 << 20;  // keeps pair numbers within 32 bits

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

}  // namespace megamoe
