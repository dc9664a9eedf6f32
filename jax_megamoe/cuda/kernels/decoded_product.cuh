// The multiply of a swapAB unit whose weights are decoded on their way: from a stage to registers, from which WGMMA takes
// its A operand. Nothing is written back to shared memory. The rows' own scales come in the epilogue, so that a partial
// sum is only multiplied by its tokens' scales.
//
// One CTA on an SM: a step is a K block. While the tensor core multiplies one, the warps decode the next, and load the
// one after it: two sets of fragments take turns, and one partial sum is enough, since decoding takes longer than
// multiplying. Therefore the next stage has to be here when a stage's first block is multiplied.
//
// Two CTAs on an SM: each has half of the registers, and the other one's warps are busy while its own wait. So there is
// one set of fragments, of a K block, or of half of it where a chunk has many tokens.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/ptx/warp.cuh"
#include "common/wgmma.cuh"
#include "kernels/e2m1.cuh"
#include "kernels/promote.cuh"
#include "kernels/ring.cuh"
#include "kernels/shared_map.cuh"

namespace megamoe {

// `kMayBeLone`: the tokens may be a lone one, whose image is in shared memory beside the ring.
template <int kN, typename Orientation, bool kDown, bool kMayBeLone>
class DecodedProduct {
 public:
  using Partial = float[kN / 2];

  __device__ __forceinline__ DecodedProduct(const MoeArguments& args, const SharedMap<Orientation>& map,
                                            const UnitNote& note)
      : args_(args),
        map_(map),
        padded_rows_(note.padded_rows()),
        token_plane_bytes_(ptx::uniform(padded_rows_ * kBlockK)),
        first_plane_(Orientation::kHalves ? ptx::uniform(first_plane()) : 0) {}

  // The unit's first stage has landed.
  __device__ __forceinline__ void run(StageCursor& cursor, Partial& acc) const {
#pragma unroll
    for (float& value : acc) value = 0.0f;
    if constexpr (Orientation::kHalves) {
      run_in_halves(cursor, acc);
    } else if (kMayBeLone && args_.constants.has_lone_token) {
      run_alone<kMayBeLone>(cursor, acc);
    } else {
      run_alone<false>(cursor, acc);
    }
  }

 private:
  // Two sets of fragments take turns.
  template <bool kLone>
  __device__ __forceinline__ void run_alone(StageCursor& cursor, Partial& acc) const {
    const int num_stages = this->num_stages();
    Fragments even, odd;
    [[maybe_unused]] const Image lone = map_.lone_token(args_.problem.hidden_size);
    const auto tokens_of = [&](int stage, int i) {
      return wgmma::Descriptor(kLone ? lone.plane(i * kStageBlocks) : map_.tokens(stage));
    };
    const auto scales_of = [&](int stage, int i, int block) {
      return kLone ? lone.scales(i * kStageBlocks + block) + threadIdx.x % 4 * 2 : token_scales(stage, block);
    };
    wgmma::Descriptor tokens = tokens_of(cursor.stage, 0);
    keep_row_terms(map_, cursor.stage);
    Words first = load(cursor.stage, 0), second = load(cursor.stage, 1);
    const E2m1Constants constants = E2m1Constants::in_registers();
    first.decode(even, constants);
#pragma unroll 1
    for (int i = 0; i < num_stages; ++i) {
      const int here = cursor.stage;
      // After the last stage comes a step that nobody reads: its own loop iteration would double the code.
      if (i < num_stages - 1) cursor.advance(map_.num_stages);
      const StageQuery next(map_.header(), cursor);
      step(scales_of(here, i, 0), tokens, even, acc, [&] {
        next.wait_at_once();
        first = load(cursor.stage, 0);
        second.decode(odd, constants);
      });
      const wgmma::Descriptor next_tokens = tokens_of(cursor.stage, i + 1);
      step(scales_of(here, i, 1), tokens.further(token_plane_bytes_), odd, acc, [&] {
        second = load(cursor.stage, 1);
        first.decode(even, constants);
      });
      release_stage<Orientation>(args_, map_.header(), here);
      tokens = next_tokens;
    }
    cursor.advance(map_.num_stages);
  }

  static constexpr int kStageBlocks = Orientation::kStageBlocks;
  static_assert(kStageBlocks == 2, "the fragments take turns");
  static constexpr int kTokenGroups = kN / 8;
  static constexpr int kInstructions = kBlockK / wgmma::kInstructionK;
  // Parts of a K block that have scales of their own, of the tokens' or the activations'.
  static constexpr int kParts = kDown ? Orientation::kActivationScalesPerBlock : 1;
  // With two CTAs on an SM there are registers for a block's fragments and two partial sums up to so many tokens, and
  // beyond for half of its fragments and one.
  static constexpr int kMostTokensOfWholeBlocks = 16;
  static constexpr bool kHalfBlocks = Orientation::kHalves && kN > kMostTokensOfWholeBlocks;
  // The tokens' scales are loaded while the tensor core is busy, as far as there are registers.
  static constexpr bool kScalesAhead = kParts * kTokenGroups <= (Orientation::kHalves ? 2 : 12);
  using Fragments = uint32_t[kInstructions][4];
  using Words = std::conditional_t<kHalfBlocks, E2m1Words, E2m1PlaneWords>;

  // One set of fragments.
  __device__ __forceinline__ void run_in_halves(StageCursor& cursor, Partial& acc) const {
    const int num_stages = this->num_stages();
    [[maybe_unused]] Fragments fragments;
    keep_row_terms(map_, cursor.stage);
    Words words = load(cursor.stage, 0);
#pragma unroll 1
    for (int left = num_stages; left > 0; --left) {
      const int here = cursor.stage;
      const wgmma::Descriptor tokens(map_.tokens(here));
      const auto load_second = [&] { words = load(here, 1); };
      if constexpr (kHalfBlocks) {
        step_by_half_blocks(here, 0, tokens, words, acc, load_second);
        step_by_half_blocks(here, 1, tokens.further(token_plane_bytes_), words, acc, [&] {
          if (left > 1) cursor.advance(map_.num_stages);
          wait_stage(map_.header(), cursor);
          words = load(cursor.stage, 0);
        });
      } else {
        if (left > 1) cursor.advance(map_.num_stages);
        const StageQuery next(map_.header(), cursor);
        words.decode(fragments);
        step(token_scales(here, 0), tokens, fragments, acc, load_second);
        words.decode(fragments);
        step(token_scales(here, 1), tokens.further(token_plane_bytes_), fragments, acc, [&] {
          next.wait_at_once();
          words = load(cursor.stage, 0);
        });
      }
      release_stage<Orientation>(args_, map_.header(), here);
    }
    cursor.advance(map_.num_stages);
  }

  __device__ __forceinline__ int num_stages() const {
    const int k_blocks = (kDown ? args_.problem.intermediate_size : args_.problem.hidden_size) / kBlockK;
    return Orientation::stages(k_blocks);
  }

  // Where the warpgroup's planes begin in a stage.
  __device__ static uint32_t first_plane() {
    return threadIdx.x / kWarpgroupThreads * (kDown ? kStageBlocks : 1) * Mxfp4::kPlaneBytes;
  }

  // Of a stage's K block `block`, the warpgroup's 64 rows. Gate/up stages hold block after block, each with the planes
  // of both warpgroups; down stages the other way round.
  __device__ __forceinline__ const uint8_t* plane(int stage, int block) const {
    const uint32_t first = Orientation::kHalves ? first_plane_ : first_plane();
    return map_.weights(stage) + first + (kDown ? block : 2 * block) * Mxfp4::kPlaneBytes;
  }

  // What is decoded first: its words, or those of its first half.
  __device__ __forceinline__ Words load(int stage, int block) const {
    if constexpr (kHalfBlocks) {
      return E2m1Words(plane(stage, block), 0);
    } else {
      return E2m1PlaneWords(plane(stage, block));
    }
  }

  // Of a stage's K block, those of the thread's first tokens.
  __device__ __forceinline__ const float* token_scales(int stage, int block) const {
    return map_.token_scales(stage) + block * kParts * padded_rows_ + threadIdx.x % 4 * 2;
  }

  // Multiplies a block and adds it up; does `meanwhile` while the tensor core is busy.
  template <typename Meanwhile>
  __device__ __forceinline__ void step(const float* token_scales, const wgmma::Descriptor& tokens, Fragments& fragments,
                                       Partial& acc, const Meanwhile& meanwhile) const {
    const auto token_scale = [&](int part, int j) {
      return *reinterpret_cast<const float2*>(token_scales + part * padded_rows_ + 8 * j);
    };
    Partial partial[kParts];
    float2 scales[kParts][kTokenGroups];
#pragma unroll
    for (Partial& part : partial) wgmma::pin(part);
    wgmma::pin(fragments);
    wgmma::fence();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      wgmma::multiply_block<kN, kInstructions / kParts>(partial[part], fragments + part * (kInstructions / kParts),
                                                        tokens, part * (kBlockK / kParts));
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
        promote(kScalesAhead ? scales[part][j] : token_scale(part, j), partial[part] + 4 * j, acc + 4 * j);
      }
    }
  }

  // The same by halves of a block: each is decoded, multiplied and waited for.
  template <typename Meanwhile>
  __device__ __forceinline__ void step_by_half_blocks(int stage, int block, const wgmma::Descriptor& tokens,
                                                      E2m1Words& words, Partial& acc,
                                                      const Meanwhile& meanwhile) const {
    constexpr bool kOneSum = kParts == 1;  // for both, which have the same scales
    Partial partial;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t fragments[kInstructions / 2][4];
      words.decode(half, fragments[0], fragments[1], E2m1Constants());
      wgmma::pin(fragments);
      wgmma::pin(partial);
      wgmma::fence();
      wgmma::multiply_block<kN, kInstructions / 2>(partial, fragments, tokens, half * (kBlockK / 2),
                                                   kOneSum && half == 1);
      wgmma::commit();
      if (half == 0) {
        words = E2m1Words(plane(stage, block), 1);
      } else {
        meanwhile();
      }
      wgmma::wait<0>();
      wgmma::pin(fragments);
      wgmma::pin(partial);
      if (kOneSum && half == 0) continue;
      const int part = block * kParts + (kOneSum ? 0 : half);
      const float* scales = map_.token_scales(stage) + part * padded_rows_ + threadIdx.x % 4 * 2;
#pragma unroll
      for (int j = 0; j < kTokenGroups; ++j) {
        promote(*reinterpret_cast<const float2*>(scales + 8 * j), partial + 4 * j, acc + 4 * j);
      }
    }
  }

  const MoeArguments& args_;
  const SharedMap<Orientation>& map_;
  int padded_rows_;
  uint32_t token_plane_bytes_;
  uint32_t first_plane_;  // halves: no other register for it
};

}  // namespace megamoe
