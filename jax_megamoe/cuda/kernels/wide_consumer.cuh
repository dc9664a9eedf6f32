// Wide consumers: weights on the WGMMA M dimension, 64 of the unit's 128 rows for each warpgroup, and up to 256 of an
// expert's tokens on N, 64 at a time. So weights that have to be decoded are decoded once for all of these tokens, into
// the registers from which WGMMA takes its A operand. Accumulator fragments are those of swapAB (swap_consumer.cuh).
//
// While one warpgroup decodes or adds up, the tensor core is the other's. The two CTAs of a cluster have neighbouring
// tiles of the same tokens, and each brings half of these to both. A K block of activations is what both make of them,
// so that they agree on its scales.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/fp8.cuh"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/l2.cuh"
#include "common/ptx/warp.cuh"
#include "common/wgmma.cuh"
#include "kernels/e2m1.cuh"
#include "kernels/images.cuh"
#include "kernels/maxima_exchange.cuh"
#include "kernels/promote.cuh"
#include "kernels/ring.cuh"
#include "kernels/shared_map.cuh"
#include "kernels/signals.cuh"
#include "kernels/activate.cuh"
#include "kernels/trace.cuh"

namespace megamoe {

// Keeps the two warpgroups half a K block apart, so that one multiplies while the other decodes: left alone they wait for
// the same stage and fall into step. The second begins a block once the first has begun the second half of its own, and
// the other way round.
struct BlockTurns {
  // Before the first block and after the last one.
  __device__ __forceinline__ static void begin() {
    if (warpgroup() == 1) pass();
  }
  __device__ __forceinline__ static void end() {
    if (warpgroup() == 0) await();
  }
  __device__ __forceinline__ static void await() {
    ptx::named_barrier_sync(kFirstTurnBarrier + warpgroup(), kConsumerThreads);
  }
  __device__ __forceinline__ static void pass() {
    ptx::named_barrier_arrive(kFirstTurnBarrier + 1 - warpgroup(), kConsumerThreads);
  }

 private:
  __device__ static uint32_t warpgroup() { return threadIdx.x / kWarpgroupThreads; }
};

template <typename Wide, typename Group>
class WideConsumer {
 public:
  __device__ __forceinline__ WideConsumer(const MoeArguments& args, const SharedMap<Wide>& map, const UnitNote& note,
                                          Signaller<Wide>& signaller, Tracer& tracer)
      : args_(args), map_(map), note_(map.kept_note(threadIdx.x / 32)), signaller_(signaller), tracer_(tracer) {
    static_assert(Wide::kUnitTiles == 1 && Wide::kStageBlocks == 1 && Wide::kActivationScaleColumns == kBlockK);
    __syncwarp();  // all have read the last unit's
    if (threadIdx.x % 32 == 0) note_ = note;
    __syncwarp();
    fetch_sources();
  }

  __device__ __forceinline__ void run(StageCursor& cursor) {
    Sums sums;
    multiply(cursor, sums);
    tracer_.mark_by_first(TraceEvent::kUnitMultiplied);
    if (note_.rows() == 0) return;  // the cluster's other CTA has a tile, and this one has none
    if (note_.down()) {
      finish_down(sums);
    } else {
      finish_gate_up(sums);
    }
  }

 private:
  static constexpr int kN = 64;  // tokens of one multiply
  static constexpr int kParts = Wide::kTokenTile / kN;
  static constexpr int kInstructions = kBlockK / wgmma::kInstructionK;
  static constexpr int kScalesAhead = 4;  // of eight tokens each
  static constexpr int kLoopTokens = 32;  // of an epilogue's loops
  static constexpr int kLoopSums = kLoopTokens / 2;
  using Part = float[kN / 2];
  using Sums = Part[kParts];
  using Fragments = uint32_t[kInstructions][4];

  __device__ static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  __device__ static int thread_in_group() { return threadIdx.x % kWarpgroupThreads; }
  __device__ static int warp_in_group() { return threadIdx.x / 32 % 4; }
  __device__ static int quad_row() { return threadIdx.x % 32 / 4; }   // l/4
  __device__ static int quad_token() { return threadIdx.x % 4 * 2; }  // 2*(l%4)
  __device__ const RowSource* sources() const { return map_.wide_sources(warpgroup()); }

  // As swapAB does.
  __device__ __forceinline__ void fetch_sources() const {
    const int row = 2 * thread_in_group();
    if (row < note_.rows()) {
      ptx::copy_async_16(map_.wide_sources(warpgroup()) + row,
                         Group::own(args_.workspace.row_sources) + note_.row_base + row, true);
    }
    ptx::commit_copies();
  }

  // Calls `visit(part)` for each part of the sums that has tokens. The first has, where there are none too.
  template <typename Visit>
  __device__ __forceinline__ void for_parts(const Visit& visit) const {
    visit(0);
    const int rows = note_.rows();
#pragma unroll
    for (int part = 1; part < kParts; ++part) {
      if (part * kN < rows) visit(part);
    }
  }

  __device__ __forceinline__ E2m1PlaneWords load(int stage) const {
    return E2m1PlaneWords(map_.weights(stage) + warpgroup() * Mxfp4::kPlaneBytes);
  }

  // A step is a K block: its weights are decoded, and multiplied by 64 tokens after the other. The words of the next
  // block are loaded under the first multiply.
  __device__ __forceinline__ void multiply(StageCursor& cursor, Sums& sums) {
    const int k_blocks = (note_.down() ? args_.problem.intermediate_size : args_.problem.hidden_size) / kBlockK;
#pragma unroll
    for (Part& part : sums) {
#pragma unroll
      for (float& value : part) value = 0.0f;
    }
    keep_row_terms(map_, cursor.stage);
    E2m1PlaneWords words = load(cursor.stage);
#pragma unroll 1
    for (int block = 0; block < k_blocks; ++block) {
      const int here = cursor.stage;
      const wgmma::Descriptor tokens(map_.tokens(here));
      const float* token_scales = map_.token_scales(here) + quad_token();
      Fragments fragments;
      words.decode(fragments);
      // After the last block comes one that nobody multiplies: its own iteration would double the code.
      if (block < k_blocks - 1) cursor.advance(map_.num_stages);
      const StageQuery next(map_.header(), cursor);
      for_parts([&](int part) {
        Part partial;
        wgmma::pin(partial);
        wgmma::pin(fragments);
        wgmma::fence();
        if (part == 0) BlockTurns::await();
        wgmma::multiply_block<kN, kInstructions>(partial, fragments, tokens, part * kN * kBlockK);
        wgmma::commit();
        if (part == 0 ? note_.rows() <= kN : part == 1) BlockTurns::pass();
        if (part == 0) {
          next.wait_at_once();
          words = load(cursor.stage);
        }
        // As many as there are registers for while the tensor core is busy.
        float2 scales[kN / 8];
        const auto load_scales = [&](int begin, int end) {
#pragma unroll
          for (int j = begin; j < end; ++j) {
            scales[j] = *reinterpret_cast<const float2*>(token_scales + part * kN + 8 * j);
          }
        };
        load_scales(0, kScalesAhead);
        wgmma::wait<0>();
        wgmma::pin(fragments);
        wgmma::pin(partial);
        load_scales(kScalesAhead, kN / 8);
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) promote(scales[j], partial + 4 * j, sums[part] + 4 * j);
      });
      release_stage<Wide>(args_, map_.header(), here);
    }
    cursor.advance(map_.num_stages);
  }

  // `visit(acc, first_token)` for 32 tokens at a time, whose sums are the first of `acc`: those of others move to the
  // front instead of being unrolled.
  template <typename Visit>
  __device__ __forceinline__ static void for_loops(Part& acc, int first_token, const Visit& visit) {
#pragma unroll 1
    for (int first = first_token; first < first_token + kN; first += kLoopTokens) {
      visit(acc, first);
#pragma unroll
      for (int i = 0; i < kLoopSums; ++i) {
        const float front = acc[i];
        acc[i] = acc[kLoopSums + i];
        acc[kLoopSums + i] = front;
      }
    }
  }

  // Activation, routing weight, power-of-two scale over the cluster's 128 columns, E4M3, into the chunk's activation image.
  __device__ __forceinline__ void finish_gate_up(Sums& sums) {
    const MaximaExchange<Wide> exchange(map_);
    const RowTerms row_terms = map_.quad_row_terms();
    ptx::wait_copies<0>();  // the sources
    with_activation(args_.activation, [&](const auto& activate) {
      for_parts([&](int part) {
        for_loops(sums[part], part * kN, [&](Part& acc, int first_token) {
          float amax[kLoopSums / 2];
#pragma unroll
          for (int i = 0; i < kLoopSums / 2; ++i) {
            float& value = acc[4 * (i / 2) + i % 2];
            value = activate(row_terms.low(value), row_terms.high(acc[4 * (i / 2) + 2 + i % 2]));
            amax[i] = fabsf(value);
          }
          map_.wide_amax(threadIdx.x / 32)[first_token + token_of(quad_row())] = largest_of_columns(amax);
        });
      });
    });
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    find_scale(exchange);
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    for_parts([&](int part) {
      for_loops(sums[part], part * kN, [&](Part& acc, int first_token) {
        uint32_t bytes[2] = {0, 0};  // tokens 0 to 3 of `token_of`, and 4 to 7
#pragma unroll
        for (int j = 0; j < kLoopTokens / 8; ++j) {
          // Routing weight and 1 / scale of two tokens.
          const float4 factors = *reinterpret_cast<const float4*>(map_.wide_factors() + first_token + token_of(2 * j));
          const uint32_t two = fp8::pack2(acc[4 * j] * factors.x * factors.y, acc[4 * j + 1] * factors.z * factors.w);
          bytes[j / 2] |= two << j % 2 * 16;
        }
        put_activations(bytes, first_token);
      });
    });
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    store_activations();
    ptx::fence_proxy_async_global();  // the copy engine reads what was just written
    if (threadIdx.x == 0) exchange.end();
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    if (threadIdx.x == 0) signaller_.post(map_.counters(args_).units_done(note_.chunk));
  }

  // Of 32 tokens, those of which this lane has sums, by number.
  __device__ static int token_of(int i) { return 8 * (i / 2) + quad_token() + i % 2; }

  // `values` are those of eight tokens in this lane's column. Returns the largest of token number `quad_row()` in all
  // eight columns: both halves of the lanes give each other the values of half of the tokens, three times.
  __device__ __forceinline__ static float largest_of_columns(float (&values)[8]) {
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
      const bool upper = (quad_row() & half) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float given = upper ? values[i] : values[half + i];
        const float kept = upper ? values[half + i] : values[i];
        values[i] = fmaxf(kept, __shfl_xor_sync(~0u, given, 4 * half));
      }
    }
    return values[0];
  }

  // One thread for each token: from the maxima of all warps of both CTAs.
  __device__ __forceinline__ void find_scale(const MaximaExchange<Wide>& exchange) const {
    static_assert(Wide::kTokenTile <= kConsumerThreads);
    const int token = threadIdx.x, padded = note_.padded_rows();
    if (token >= padded) return;
    float amax = 0.0f;
#pragma unroll
    for (int w = 0; w < kConsumerWarps; ++w) amax = fmaxf(amax, map_.wide_amax(w)[token]);
    amax = exchange.larger(amax, token, padded);
    // Multiplying by the weight after the maximum is exact: rounding is monotonic.
    const float weight = sources()[token].weight;
    const float scale = fp8::activation_scale(amax * fabsf(weight));
    map_.wide_factors()[token] = make_float2(weight, fp8::reciprocal_of_power_of_two(scale));
    if (token < note_.rows() && note_.tile % 2 == 0 && Group::has_tokens()) {
      activation_image<Wide>(args_, note_).scales(note_.tile / 2)[token] = scale;
    }
  }

  // Rows of 64 bytes, the unit's columns of a token; of four rows, pieces of 16 bytes are permuted so that words of eight
  // rows meet all banks.
  __device__ static int activation_offset(int token, int column) {
    return token * kGateUpTileColumns + ((column >> 4 ^ token >> 1) & 3) * 16 + column % 16;
  }

  // `bytes` hold this lane's intermediate column of eight tokens. Four lanes put four columns of a token together: each
  // keeps two of the tokens, by what both halves of the lanes give each other, twice.
  __device__ __forceinline__ void put_activations(const uint32_t (&bytes)[2], int first_token) const {
    const int r = quad_row();
    const bool odd = (r & 1) != 0, upper = (r & 2) != 0;
    const uint32_t other = __shfl_xor_sync(~0u, odd ? bytes[0] : bytes[1], 4);
    const uint32_t low = odd ? other : bytes[0], high = odd ? bytes[1] : other;  // four tokens of two columns
    // Two tokens of each column, those to keep and those to give.
    const uint32_t first = __byte_perm(low, high, 0x5410), second = __byte_perm(low, high, 0x7632);
    const uint32_t mine = upper ? second : first;
    const uint32_t others = __shfl_xor_sync(~0u, upper ? first : second, 8);
    const uint32_t lower_columns = upper ? others : mine, upper_columns = upper ? mine : others;
    const int column = warpgroup() * 32 + warp_in_group() * 8 + (r & 4);
    const int token = first_token + token_of((odd ? 4 : 0) + (upper ? 2 : 0));
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      *reinterpret_cast<uint32_t*>(map_.wide_tile(0) + activation_offset(token + c, column)) =
          __byte_perm(lower_columns, upper_columns, c == 0 ? 0x6420 : 0x7531);
    }
  }

  // Out of shared memory, 64 bytes of a token side by side, which is where columns change places.
  __device__ __forceinline__ void store_activations() const {
    constexpr int kPieces = kGateUpTileColumns / 16;
    const int piece = threadIdx.x % kPieces * 16;
    const int column = note_.tile * kGateUpTileColumns + piece;
    uint8_t* plane = activation_image<Wide>(args_, note_).plane(column / kBlockK);
#pragma unroll 1
    for (int token = threadIdx.x / kPieces; token < note_.rows() && Group::has_tokens();
         token += kConsumerThreads / kPieces) {
      const auto word = [&](int i) {
        return *reinterpret_cast<const uint32_t*>(map_.wide_tile(0) +
                                                  activation_offset(token, transposed_column(piece + 4 * i)));
      };
      ptx::store(plane + swizzled_offset(token, column % kBlockK), make_uint4(word(0), word(1), word(2), word(3)),
                 args_.constants.activations_stay);
    }
  }

  // BF16 rows of this warpgroup's 64 hidden columns, part after part.
  __device__ __forceinline__ void finish_down(Sums& sums) {
    const uint32_t barrier = kFirstWarpgroupBarrier + warpgroup();
    uint8_t* tile = map_.wide_tile(warpgroup());
    const RowTerms row_terms = map_.quad_row_terms();
    ptx::wait_copies<0>();  // the sources
    const int tile_column = (warp_in_group() * 16 + 2 * quad_row()) * static_cast<int>(sizeof(uint16_t));
    constexpr int kLanesPerRow = kDownTileRowBytes / sizeof(uint4);
    const int piece = thread_in_group() % kLanesPerRow;
    const int column = note_.tile * kDownUnitColumns + warpgroup() * kDownTileColumns + piece * 8;
    // Two loops: most models have no biases, and what they take would be 2 % of a call. NaN is a bias, too.
    const bool has_bias = __any_sync(~0u, row_terms.bias.x != 0.0f || row_terms.bias.y != 0.0f);
    ptx::named_barrier_sync(barrier, kWarpgroupThreads);  // sources that other threads have copied
    for_parts([&](int part) {
      const auto put = [&](const auto& finished) {
        for_loops(sums[part], 0, [&](Part& acc, int first_token) {
#pragma unroll
          for (int i = 0; i < kLoopSums / 2; ++i) {
            const float* value = acc + 4 * (i / 2) + i % 2;
            const int token = first_token + token_of(i);
            const float2 pair = finished(value[0], value[2], sources()[part * kN + token]);
            *reinterpret_cast<__nv_bfloat162*>(tile + swizzled_offset(token, tile_column)) =
                __floats2bfloat162_rn(pair.x, pair.y);
          }
        });
      };
      if (has_bias) {
        put([&](float low, float high, const RowSource& source) {
          return make_float2(row_terms.low(low, source.weight), row_terms.high(high, source.weight));
        });
      } else {
        put([&](float low, float high, const RowSource&) {
          return make_float2(low * row_terms.scale.x, high * row_terms.scale.y);
        });
      }
      ptx::named_barrier_sync(barrier, kWarpgroupThreads);
      const int rows = min(kN, note_.rows() - part * kN);
#pragma unroll 1
      for (int token = thread_in_group() / kLanesPerRow; token < rows && Group::has_tokens();
           token += kWarpgroupThreads / kLanesPerRow) {
        *reinterpret_cast<uint4*>(Group::slot_row(args_, sources()[part * kN + token].route) + column) =
            *reinterpret_cast<const uint4*>(tile + swizzled_offset(token, piece * static_cast<int>(sizeof(uint4))));
      }
      ptx::named_barrier_sync(barrier, kWarpgroupThreads);
    });
    if (thread_in_group() == 0) signaller_.post(map_.counters(args_).down_done(note_.tile));
  }

  const MoeArguments& args_;
  const SharedMap<Wide>& map_;
  UnitNote&
      note_;  // in shared memory, as the scales of the rows: there are no registers for what the multiply does not need
  Signaller<Wide>& signaller_;
  Tracer& tracer_;
};

}  // namespace megamoe
