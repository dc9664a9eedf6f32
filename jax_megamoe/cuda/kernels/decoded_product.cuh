// The multiply of a swapAB unit whose weights are decoded on their way: from a stage to registers, from which WGMMA takes
// its A operand. Nothing is written back to shared memory.
//
// A step is a K block. While the tensor core multiplies one, the warps decode the next, and load the one after it: two
// sets of fragments take turns, and one partial sum is enough, since decoding takes longer than multiplying. Therefore
// the next stage has to be here when a stage's first block is multiplied. The rows' own scales come in the
// epilogue, so that a partial sum is only multiplied by its tokens' scales: acc += token scale * partial.
#pragma once

#include <cstdint>

#include "common/ptx/warp.cuh"
#include "common/wgmma.cuh"
#include "kernels/e2m1.cuh"
#include "kernels/ring.cuh"
#include "kernels/shared_map.cuh"

namespace megamoe {

template <int kN, typename Orientation, bool kDown>
class DecodedProduct {
 public:
  using Partial = float[kN / 2];

  __device__ __forceinline__ DecodedProduct(const MoeArguments& args, const SharedMap<Orientation>& map,
                                            const UnitNote& note)
      : args_(args),
        map_(map),
        padded_rows_(note.padded_rows()),
        token_plane_bytes_(ptx::uniform(padded_rows_ * kBlockK)) {}

  // The unit's first stage has landed.
  __device__ __forceinline__ void run(StageCursor& cursor, Partial& acc) const {
    if constexpr (Orientation::kHalves) return run_in_halves(cursor, acc);
    const int k_blocks = (kDown ? args_.problem.intermediate_size : args_.problem.hidden_size) / kBlockK;
    const int num_stages = Orientation::stages(k_blocks);
#pragma unroll
    for (float& value : acc) value = 0.0f;
    Fragments even, odd;
    wgmma::Descriptor tokens(map_.tokens(cursor.stage));
    keep_row_terms(map_, cursor.stage);
    E2m1Words first = load(cursor.stage, 0), second = load(cursor.stage, 1);
    const E2m1Constants constants = E2m1Constants::in_registers();
    first.decode(even, constants);
#pragma unroll 1
    for (int i = 0; i < num_stages; ++i) {
      const int here = cursor.stage;
      // After the last stage comes a step that nobody reads: its own loop iteration would double the code.
      if (i < num_stages - 1) cursor.advance(map_.num_stages);
      const StageQuery next(map_.header(), cursor);
      step(here, tokens, 0, even, acc, [&] {
        next.wait_at_once();
        first = load(cursor.stage, 0);
        second.decode(odd, constants);
      });
      const wgmma::Descriptor next_tokens(map_.tokens(cursor.stage));
      step(here, tokens, 1, odd, acc, [&] {
        second = load(cursor.stage, 1);
        first.decode(even, constants);
      });
      release_stage<Orientation>(args_, map_.header(), here);
      tokens = next_tokens;
    }
    cursor.advance(map_.num_stages);
  }

 private:
  static constexpr int kStageBlocks = Orientation::kStageBlocks;
  static_assert(kStageBlocks == 2, "the fragments take turns");
  static constexpr int kTokenGroups = kN / 8;
  static constexpr int kInstructions = kBlockK / wgmma::kInstructionK;
  // Parts of a K block that have scales of their own, of the tokens' or the activations'.
  static constexpr int kParts = kDown ? Orientation::kActivationScalesPerBlock : 1;
  // The tokens' scales are loaded while the tensor core is busy, as far as there are registers.
  static constexpr bool kScalesAhead = kParts * kTokenGroups <= (Orientation::kHalves ? 2 : 12);
  using Fragments = uint32_t[kInstructions][4];

  // One set of fragments: the warps of the SM's other CTA are busy while these decode or wait.
  __device__ __forceinline__ void run_in_halves(StageCursor& cursor, Partial& acc) const {
    const int k_blocks = (kDown ? args_.problem.intermediate_size : args_.problem.hidden_size) / kBlockK;
    const int num_stages = Orientation::stages(k_blocks);
#pragma unroll
    for (float& value : acc) value = 0.0f;
    Fragments fragments;
    keep_row_terms(map_, cursor.stage);
    E2m1Words words = load(cursor.stage, 0);
#pragma unroll 1
    for (int i = 0; i < num_stages; ++i) {
      const int here = cursor.stage;
      const wgmma::Descriptor tokens(map_.tokens(here));
      if (i < num_stages - 1) cursor.advance(map_.num_stages);
      const StageQuery next(map_.header(), cursor);
      words.decode(fragments);
      step(here, tokens, 0, fragments, acc, [&] { words = load(here, 1); });
      words.decode(fragments);
      step(here, tokens, 1, fragments, acc, [&] {
        next.wait_at_once();
        words = load(cursor.stage, 0);
      });
      release_stage<Orientation>(args_, map_.header(), here);
    }
    cursor.advance(map_.num_stages);
  }

  // Of a stage's K block `block`, the warpgroup's 64 rows. Gate/up stages hold block after block, each with the planes
  // of both warpgroups; down stages the other way round.
  __device__ __forceinline__ E2m1Words load(int stage, int block) const {
    const int warpgroup = threadIdx.x / kWarpgroupThreads;
    const int plane = kDown ? warpgroup * kStageBlocks + block : block * 2 + warpgroup;
    return E2m1Words(map_.weights(stage) + plane * Mxfp4::kPlaneBytes);
  }

  // Multiplies a block and adds it up; does `meanwhile` while the tensor core is busy.
  template <typename Meanwhile>
  __device__ __forceinline__ void step(int stage, const wgmma::Descriptor& tokens, int block, Fragments& fragments,
                                       Partial& acc, const Meanwhile& meanwhile) const {
    Partial partial[kParts];
    const float* token_scales = map_.token_scales(stage) + block * kParts * padded_rows_ + threadIdx.x % 4 * 2;
    const auto token_scale = [&](int part, int j) {
      return *reinterpret_cast<const float2*>(token_scales + part * padded_rows_ + 8 * j);
    };
    float2 scales[kParts][kTokenGroups];
#pragma unroll
    for (Partial& part : partial) wgmma::pin(part);
    wgmma::pin(fragments);
    wgmma::fence();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      wgmma::multiply_block<kN, kInstructions / kParts>(partial[part], fragments + part * (kInstructions / kParts),
                                                        tokens, block * token_plane_bytes_ + part * (kBlockK / kParts));
    }
    wgmma::commit();
    if constexpr (kScalesAhead) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int j = 0; j < kTokenGroups; ++j) scales[part][j] = token_scale(part, j);
      }
    }
    meanwhile();
    wgmma::wait<0>();
    wgmma::pin(fragments);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      wgmma::pin(partial[part]);
#pragma unroll
      for (int j = 0; j < kTokenGroups; ++j) {
        const float2 token = kScalesAhead ? scales[part][j] : token_scale(part, j);
        const float* sum = partial[part] + 4 * j;
        acc[4 * j + 0] = fmaf(token.x, sum[0], acc[4 * j + 0]);
        acc[4 * j + 1] = fmaf(token.y, sum[1], acc[4 * j + 1]);
        acc[4 * j + 2] = fmaf(token.x, sum[2], acc[4 * j + 2]);
        acc[4 * j + 3] = fmaf(token.y, sum[3], acc[4 * j + 3]);
      }
    }
  }

  const MoeArguments& args_;
  const SharedMap<Orientation>& map_;
  int padded_rows_;
  uint32_t token_plane_bytes_;
};

}  // namespace megamoe
