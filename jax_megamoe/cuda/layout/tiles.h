// Tile geometry shared by host and device. The weight layout is documented in jax_megamoe/weight_layout.py, its
// Python twin.
#pragma once

#include <cstdint>

#if __has_include(<cuda_runtime_api.h>)
#include <cuda_runtime_api.h>
#else  // a CPU-only build
#define __host__
#define __device__
#endif

namespace megamoe {

// A plane is 64 rows of weights x 128 columns of K, in the order in which a WGMMA operand wants them.
constexpr int kPlaneRows = 64;
constexpr int kBlockK = 128;
// Floats for the rows of a plane, where rows have scales: 64 scales, then 64 biases.
constexpr int kPlaneRowTerms = 2 * kPlaneRows;
// Scales of blocks are stored as 16-byte vectors: for gate/up one per K block (gate, up, 0, 0), for down one per two
// K blocks.
constexpr int kScaleVectorFloats = 4;
constexpr int kScaleVectorBytes = kScaleVectorFloats * 4;
// Rows of weights that a unit of work multiplies: 64 gate and 64 up rows, or two neighbouring tiles of 64 hidden
// columns.
constexpr int kGateUpTileColumns = 64;
constexpr int kDownTileColumns = 64;
constexpr int kDownUnitColumns = 2 * kDownTileColumns;
// Intermediate columns that share one activation scale: what a unit has of them. Scales are powers of two, so that
// the larger of two neighbours' serves both with the same FP8 values, but for those that get subnormal.
constexpr int activation_scale_columns(bool swap_operands) { return (swap_operands ? 1 : 2) * kGateUpTileColumns; }

// Tokens of one expert that one unit of work multiplies. swapAB puts them on the WGMMA N dimension,
// the normal orientation on M.
constexpr int kSwapTokenTile = 56;    // 64 would spill registers
constexpr int kHalvesTokenTile = 40;  // with half of an SM's registers for a CTA, 48 would
constexpr int kNormalTokenTile = 128;
constexpr int kLoneTokenRows = 8;  // of the image of a launch's only token (kernels/lone_token.cuh)
// Where images go through rings, gate/up and down units take so many chunks of an expert one after the other, and then
// the next, and both take turns after so many chunks.
constexpr int kRunChunks = 8;
constexpr int kDownRunChunks = 64;
constexpr int kTurnChunks = 128;
static_assert(kDownRunChunks % kRunChunks == 0);
constexpr int kWarpgroupTokens = 64;  // of them, one warpgroup's: WGMMA's M

constexpr int kMaxSms = 256;           // of a device
constexpr int kMaxCtas = 2 * kMaxSms;  // of a launch, or of a rank of it
constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;
constexpr int kMaxTokens = 1 << 20;  // keeps the numbers of routes within 32 bits

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

}  // namespace megamoe
