// Normal orientation: a chunk's tokens on the WGMMA M dimension, 64 per warpgroup, weight rows on N, two tiles of 128
// rows one after the other. Where a chunk has no more than 64 tokens, both warpgroups take all of them, and a tile
// each. Accumulator fragment: thread (warp w, lane l) holds tokens 16w + l/4 and + 8; for every 8 weight rows b, rows
// 8b + 2*(l%4) and + 1. In the weight layout even b are gate rows and odd b the matching up rows; for the down
// projection rows q of block 2g and q of block 2g + 1 are neighbouring hidden columns.
//
// While one warpgroup promotes or works on its epilogue, the tensor core is the other's: they wait for each other
// nowhere, but where they share tokens and have to agree on the activations' scales.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "common/fp8.cuh"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/l2.cuh"
#include "common/ptx/memory_order.cuh"
#include "common/ptx/warp.cuh"
#include "common/wgmma.cuh"
#include "kernels/images.cuh"
#include "kernels/ring.cuh"
#include "kernels/row_gather.cuh"
#include "kernels/shared_map.cuh"
#include "kernels/signals.cuh"
#include "kernels/activate.cuh"
#include "kernels/trace.cuh"

namespace megamoe {

template <typename Normal, typename Group>
class NormalConsumer {
 public:
  __device__ __forceinline__ NormalConsumer(const MoeArguments& args, const SharedMap<Normal>& map,
                                            const UnitNote& note, Signaller<Normal>& signaller, Tracer& tracer)
      : args_(args), map_(map), note_(kept(map, note)), signaller_(signaller), tracer_(tracer) {
    static_assert(Normal::kUnitTiles == kConsumerWarpgroups && Normal::kStageBlocks == 1);
    static_assert(Normal::kActivationScaleColumns == kBlockK,
                  "a gate/up unit's columns are one K block of the down projection");
    if constexpr (kKeepsUnit) {
      fetch_sources();
      return;
    }
    if (threadIdx.x % kWarpgroupThreads == 0) map.header().kept[warpgroup()] = note.chunk;
    const bool shares_tokens = note.rows() <= kWarpgroupTokens;
    first_row_ = shares_tokens ? 0 : warpgroup() * kWarpgroupTokens;
    first_tile_ = shares_tokens ? warpgroup() : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (token(half) < note.rows()) {
        const int2 raw =
            __ldcg(reinterpret_cast<const int2*>(Group::own(args.workspace.row_sources) + note.row_base + token(half)));
        source_[half] = {raw.x, __int_as_float(raw.y)};
      }
    }
    // From here on, of the activations.
    note_.row_base = activation_row_base<Normal, Group>(args, note.chunk, note.row_base);
  }

  __device__ __forceinline__ void run(StageCursor& cursor) {
    if (note_.rows() <= kWarpgroupTokens) {
      run_tiles<1>(cursor);
    } else {
      run_tiles<Normal::kUnitTiles>(cursor);
    }
  }

 private:
  static constexpr bool kRowScales = Normal::Format::kRowScales;
  static constexpr bool kKeepsUnit = Normal::kHasDecoders;
  using Note = std::conditional_t<kKeepsUnit, UnitNote&, UnitNote>;
  static constexpr int kN = 2 * kPlaneRows;
  static constexpr int kAccumulators = kN / 2;
  template <int kTiles>
  using Sums = float[kTiles][kAccumulators];

  __device__ static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  __device__ static int quad_lane() { return threadIdx.x % 4; }
  // The chunk's row that this thread holds in the low or high half of a fragment.
  __device__ int token(int half) const {
    return first_row() + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * half;
  }

  // The unit's note where the multiply leaves room for it.
  __device__ __forceinline__ static Note kept(const SharedMap<Normal>& map, const UnitNote& note) {
    if constexpr (kKeepsUnit) {
      UnitNote& place = map.kept_unit(threadIdx.x / 32).note;
      __syncwarp();  // all have read the last unit's
      if (threadIdx.x % 32 == 0) place = note;
      __syncwarp();
      return place;
    } else {
      return note;
    }
  }

  // Sources of the warp's rows, by copies that end while it multiplies.
  __device__ __forceinline__ void fetch_sources() const {
    const int lane = threadIdx.x % 32, row = first_row() + threadIdx.x / 32 % 4 * 16 + 2 * lane;
    if (lane < 8 && row < note_.rows()) {
      ptx::copy_async_16(map_.kept_unit(threadIdx.x / 32).source + 2 * lane,
                         Group::own(args_.workspace.row_sources) + note_.row_base + row, true);
    }
    ptx::commit_copies();
  }

  // ... for the epilogue.
  __device__ __forceinline__ void take_sources() {
    if constexpr (kKeepsUnit) {
      ptx::wait_copies<0>();
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half)
        source_[half] = map_.kept_unit(threadIdx.x / 32).source[threadIdx.x % 32 / 4 + 8 * half];
    }
  }

  // The chunk's first row, and the unit's first tile, that this warpgroup has.
  __device__ int first_row() const {
    if constexpr (kKeepsUnit) return note_.rows() <= kWarpgroupTokens ? 0 : warpgroup() * kWarpgroupTokens;
    return first_row_;
  }
  __device__ int first_tile() const {
    if constexpr (kKeepsUnit) return note_.rows() <= kWarpgroupTokens ? warpgroup() : 0;
    return first_tile_;
  }

  template <int kTiles>
  __device__ __forceinline__ void run_tiles(StageCursor& cursor) {
    Sums<kTiles> acc;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) acc[t][i] = 0.0f;
    }
    if (note_.down()) {
      accumulate<true, kTiles>(cursor, acc);
      tracer_.mark_by_first(TraceEvent::kUnitMultiplied);
      take_sources();
      if constexpr (kRowScales) apply_row_terms<true, kTiles>(acc);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) finish_down(acc[t], note_.tile * Normal::kUnitTiles + first_tile() + t);
      announce<true>();
    } else {
      accumulate<false, kTiles>(cursor, acc);
      tracer_.mark_by_first(TraceEvent::kUnitMultiplied);
      take_sources();
      if constexpr (kRowScales) apply_row_terms<false, kTiles>(acc);
      finish_gate_up<kTiles>(acc);
      ptx::fence_proxy_async_global();  // the copy engine reads what was just written
      announce<false>();
    }
  }

  // This warpgroup's share of the unit is stored.
  template <bool kDown>
  __device__ __forceinline__ void announce() {
    if (note_.rows() == 0) return;  // the cluster's other CTA has a tile, and this one has none
    ptx::named_barrier_sync(kFirstWarpgroupBarrier + warpgroup(), kWarpgroupThreads);
    if (threadIdx.x % kWarpgroupThreads != 0) return;
    const CounterSet& counters = map_.counters(args_);
    if (kDown) signaller_.post(counters.down_done(note_.tile));
    if (!kDown || assembles_images<Normal, Group>(args_)) {
      signaller_.post(counters.units_done(kKeepsUnit ? note_.chunk : map_.header().kept[warpgroup()]));
    }
  }

  // Scales and biases of the unit's rows, out of its first stage, for this warpgroup's epilogue.
  __device__ __forceinline__ void keep_row_terms(int stage) const {
    const int i = threadIdx.x % kWarpgroupThreads;
    static_assert(!kRowScales || Normal::kRowTermBytes == kWarpgroupThreads * sizeof(float4));
    reinterpret_cast<float4*>(map_.kept_row_terms(warpgroup()))[i] =
        reinterpret_cast<const float4*>(map_.row_terms(stage))[i];
  }

  // Sums times the scales of their rows, plus their biases, which for down the routing weight multiplies. In memory,
  // gate's and up's of a column, or those of two neighbouring hidden columns, are side by side: those of rows 8b + q and
  // 8(b + 1) + q for even b.
  template <bool kDown, int kTiles>
  __device__ __forceinline__ void apply_row_terms(Sums<kTiles>& acc) const {
    ptx::named_barrier_sync(kFirstWarpgroupBarrier + warpgroup(), kWarpgroupThreads);
    constexpr int kPlanePairs = kPlaneRows / 2, kTilePairs = kPlaneRowTerms;  // 2 planes of scales and biases
    const float2* terms = reinterpret_cast<const float2*>(map_.kept_row_terms(warpgroup())) + first_tile() * kTilePairs;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int b = 0; b < kN / 8; b += 2) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int plane = b / 8;
          const float2* pair = terms + t * kTilePairs + (b + plane * 8) * 4 + 2 * quad_lane() + c;
          const RowTerms row = {pair[0], pair[kPlanePairs]};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float factor = kDown ? source_[half].weight : 1.0f;
            float& low = acc[t][4 * b + 2 * half + c];
            float& high = acc[t][4 * (b + 1) + 2 * half + c];
            low = row.low(low, factor);
            high = row.high(high, factor);
          }
        }
      }
    }
  }

  // acc += (token scale * weight scale) * partial; weight blocks of eight rows alternate between two scales.
  __device__ __forceinline__ static void promote(float (&acc)[kAccumulators], const float (&partial)[kAccumulators],
                                                 const float (&token)[2], float weight_even, float weight_odd) {
    const float scale[2][2] = {{token[0] * weight_even, token[1] * weight_even},
                               {token[0] * weight_odd, token[1] * weight_odd}};
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) acc[i] = fmaf(scale[i / 4 % 2][i / 2 % 2], partial[i], acc[i]);
  }

  // The words of a stage's descriptors.
  struct StageWords {
    uint32_t tokens, weights;
  };
  __device__ __forceinline__ StageWords stage_words(int stage) const {
    return {wgmma::Descriptor::low_word(map_.tokens(stage) + first_row() * kBlockK),
            wgmma::Descriptor::low_word(map_.weights(stage) + first_tile() * Normal::kOperandTileBytes)};
  }

  // One partial sum at a time: with 64 x 256 sums there are no registers for two. The other warpgroup fills the gap, as
  // far as its 256 cycles of multiplies last: between the last addition of a block and the first multiply of the next
  // there is as little as can be. What the next block needs is asked for, and worked out, under the last multiply.
  template <bool kDown, int kTiles>
  __device__ __forceinline__ void accumulate(StageCursor& cursor, Sums<kTiles>& acc) {
    const Problem& p = args_.problem;
    const int k_blocks = (kDown ? p.intermediate_size : p.hidden_size) / kBlockK;
    StageQuery next(map_.header(), cursor);
    StageWords words = stage_words(cursor.stage);
#pragma unroll 1
    for (int block = 0; block < k_blocks; ++block) {
      const int stage = cursor.stage;
      next.wait_at_once();
      const wgmma::Descriptor tokens(words.tokens), weights(words.weights);
      const float* token_scales = map_.token_scales(stage) + token(0);
      const float* weight_scales =
          map_.header().weight_scale[stage] + (kDown ? first_tile() * kScaleVectorFloats + block % 2 : 0);
      if constexpr (kRowScales) {
        if (block == 0) keep_row_terms(stage);
      }
      if (!kDown && gathers_rows<Normal, Group>(args_)) ptx::fence_proxy_async_shared();  // by copies of threads
      const float token_scale[2] = {token_scales[0], token_scales[8]};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        float partial[kAccumulators];
        wgmma::pin(partial);
        wgmma::fence();
        wgmma::multiply_block<kN, kBlockK / wgmma::kInstructionK, Normal::kHasDecoders>(partial, tokens, 0, weights,
                                                                                        t * Normal::kOperandTileBytes);
        wgmma::commit();
        if (t == kTiles - 1) {
          // After the last block comes the same one again, which nobody multiplies.
          if (block < k_blocks - 1) cursor.advance(map_.num_stages);
          next = StageQuery(map_.header(), cursor);
          words = stage_words(cursor.stage);
        }
        const float even = kRowScales ? 1.0f : weight_scales[kDown ? t * kScaleVectorFloats : 0];
        const float odd = kRowScales || kDown ? even : weight_scales[1];
        wgmma::wait<0>();
        wgmma::pin(partial);
        if (t == kTiles - 1) release_stage<Normal>(args_, map_.header(), stage);
        promote(acc[t], partial, token_scale, even, odd);
      }
    }
    cursor.advance(map_.num_stages);
  }

  // Activation, routing weight, power-of-two scale over the unit's 128 columns, E4M3, into the chunk's activation image.
  template <int kTiles>
  __device__ __forceinline__ void finish_gate_up(Sums<kTiles>& acc) {
    const Problem& p = args_.problem;
    const int padded = note_.padded_rows();
    float amax[2] = {0.0f, 0.0f};
    with_activation(args_.activation, [&](const auto& activate) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int q = 0; q < 8; ++q) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float& value = acc[t][8 * q + 2 * half + c];
              value = activate(value, acc[t][8 * q + 4 + 2 * half + c]) * source_[half].weight;
              amax[half] = fmaxf(amax[half], fabsf(value));
            }
          }
        }
      }
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      amax[half] = fmaxf(amax[half], __shfl_xor_sync(~0u, amax[half], 1));
      amax[half] = fmaxf(amax[half], __shfl_xor_sync(~0u, amax[half], 2));
    }
    if constexpr (kTiles == 1) exchange_maxima(amax);

    // activation_image's plane and scales, written out: through it, nvcc moves other code around.
    uint8_t* plane = args_.workspace.activation_planes + static_cast<size_t>(note_.row_base) * p.intermediate_size +
                     static_cast<size_t>(note_.tile) * padded * kBlockK;
    float* scales = args_.workspace.activation_scales +
                    static_cast<size_t>(note_.row_base) * (p.intermediate_size / Normal::kActivationScaleColumns) +
                    static_cast<size_t>(note_.tile) * padded;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = fp8::activation_scale(amax[half]);
      const float inverse = fp8::reciprocal_of_power_of_two(scale);
      const bool stores = token(half) < note_.rows() && Group::has_tokens();
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        // Word j: columns 16j + 2*(l%4) and + 1, then the same + 8. The quad's lanes change words for 16 columns in a
        // row.
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* value = acc[t] + 16 * j + 2 * half;
          const uint32_t low = fp8::pack2(value[0] * inverse, value[1] * inverse);
          const uint32_t high = fp8::pack2(value[8] * inverse, value[9] * inverse);
          words[j] = low | high << 16;
        }
        transpose_in_quad(words);
        if (!stores) continue;
        const int column = (first_tile() + t) * kGateUpTileColumns + 16 * quad_lane();
        ptx::store(plane + swizzled_offset(token(half), column),
                   make_uint4(__byte_perm(words[0], words[1], 0x5410), __byte_perm(words[2], words[3], 0x5410),
                              __byte_perm(words[0], words[1], 0x7632), __byte_perm(words[2], words[3], 0x7632)),
                   args_.constants.activations_stay);
      }
      if (stores && first_tile() == 0 && quad_lane() == 0) scales[token(half)] = scale;
    }
  }

  // The larger of both warpgroups' maxima, which have the same tokens and a tile each.
  __device__ __forceinline__ void exchange_maxima(float (&amax)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (quad_lane() == 0) map_.row_amax()[warpgroup() * kWarpgroupTokens + token(half)] = amax[half];
    }
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      amax[half] = fmaxf(amax[half], map_.row_amax()[(warpgroup() ^ 1) * kWarpgroupTokens + token(half)]);
    }
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);  // read, before the next unit's are written
  }

  // Afterwards lane i of a quad has word i of all four, in their order.
  __device__ __forceinline__ static void transpose_in_quad(uint32_t (&words)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        const uint32_t received = __shfl_xor_sync(~0u, upper ? words[i] : words[i | bit], bit);
        (upper ? words[i] : words[i | bit]) = received;
      }
    }
  }

  // BF16 rows of the tile's 128 hidden columns.
  __device__ __forceinline__ void finish_down(const float (&acc)[kAccumulators], int tile) {
    const int hidden = args_.problem.hidden_size;
    if (tile * kDownUnitColumns >= hidden) return;  // the copy of an odd last tile
    const bool odd_lane = (threadIdx.x & 1) != 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint16_t* row = Group::slot_row(args_, source_[half].route) + tile * kDownUnitColumns + (odd_lane ? 16 : 0) +
                      8 * (quad_lane() / 2);
      const bool stores = token(half) < note_.rows() && Group::has_tokens();
#pragma unroll
      for (int g = 0; g < 8; g += 2) {
        // A lane has four columns of each sixteen; of two sixteens in turn, even lanes store the first, odd ones the
        // second.
        const uint2 first = four_columns(acc, g, half), second = four_columns(acc, g + 1, half);
        const uint2 mine = odd_lane ? second : first, given = odd_lane ? first : second;
        const uint2 taken = make_uint2(__shfl_xor_sync(~0u, given.x, 1), __shfl_xor_sync(~0u, given.y, 1));
        if (!stores) continue;
        *reinterpret_cast<uint4*>(row + 16 * g) =
            odd_lane ? make_uint4(taken.x, taken.y, mine.x, mine.y) : make_uint4(mine.x, mine.y, taken.x, taken.y);
      }
    }
  }

  // Columns 16g + 4*(l%4) and the three after it.
  __device__ __forceinline__ static uint2 four_columns(const float (&acc)[kAccumulators], int g, int half) {
    const int even = 8 * g + 2 * half, odd = even + 4;
    const __nv_bfloat162 low = __floats2bfloat162_rn(acc[even], acc[odd]);
    const __nv_bfloat162 high = __floats2bfloat162_rn(acc[even + 1], acc[odd + 1]);
    return make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
  }

  const MoeArguments& args_;
  const SharedMap<Normal>& map_;
  Note note_;
  Signaller<Normal>& signaller_;
  Tracer& tracer_;
  int first_row_;   // of the chunk
  int first_tile_;  // of the unit
  RowSource source_[2] = {{0, 0.0f}, {0, 0.0f}};
};

}  // namespace megamoe
