// swapAB consumers: weights on the WGMMA M dimension, a chunk's tokens (padded to eight) on N. Each warpgroup
// multiplies 64 of the unit's 128 weight rows. Accumulator fragment: thread (warp w, lane l) of a warpgroup holds, for
// every 8 tokens j, rows 16w + l/4 and + 8 of tokens 8j + 2*(l%4) and + 1. The weight layout puts gate and up (or two
// neighbouring hidden columns) into such two rows.
//
// kN is the chunk's number of tokens, padded: what the padding holds is multiplied and dropped. Loops are rolled where
// that costs little: instructions come from the same memory as the weights, and each variant of the loops is first met
// while the weights keep it busy (docs/performance-log.md, "instructions").
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/fp8.cuh"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/l2.cuh"
#include "common/ptx/memory_order.cuh"
#include "common/ptx/warp.cuh"
#include "common/wgmma.cuh"
#include "kernels/decoded_product.cuh"
#include "kernels/images.cuh"
#include "kernels/lone_token.cuh"
#include "kernels/ring.cuh"
#include "kernels/shared_map.cuh"
#include "kernels/signals.cuh"
#include "kernels/activate.cuh"
#include "kernels/trace.cuh"

namespace megamoe {

template <int kN, typename Orientation, typename Group>
class SwapConsumer {
 public:
  __device__ __forceinline__ SwapConsumer(const MoeArguments& args, const SharedMap<Orientation>& map,
                                          const UnitNote& note, Signaller<Orientation>& signaller, Tracer& tracer)
      : args_(args), map_(map), note_(note), signaller_(signaller), tracer_(tracer) {
    fetch_sources();
  }

  __device__ __forceinline__ void run(StageCursor& cursor) {
    Partial acc;
    if (note().down()) {
      accumulate<true>(cursor, acc);
      tracer_.mark_by_first(TraceEvent::kUnitMultiplied);
      finish_down(acc);
    } else {
      accumulate<false>(cursor, acc);
      tracer_.mark_by_first(TraceEvent::kUnitMultiplied);
      finish_gate_up(acc);
    }
  }

 private:
  using Format = typename Orientation::Format;
  static constexpr int kPlaneBytes = Format::kPlaneBytes;
  static constexpr int kTokenGroups = kN / 8;
  static constexpr int kStageBlocks = Orientation::kStageBlocks;

  static constexpr int kActivationScalesPerBlock = Orientation::kActivationScalesPerBlock;
  using Partial = float[kN / 2];

  __device__ static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  __device__ static int thread_in_group() { return threadIdx.x % kWarpgroupThreads; }
  __device__ static int warp_in_group() { return threadIdx.x / 32 % 4; }
  __device__ static int quad_row() { return threadIdx.x % 32 / 4; }   // l/4
  __device__ static int quad_token() { return threadIdx.x % 4 * 2; }  // 2*(l%4)
  // In halves, the warp's copy in shared memory: registers have something else to hold.
  __device__ __forceinline__ UnitNote note() const {
    return Orientation::kHalves ? map_.kept_note(threadIdx.x / 32) : note_;
  }
  __device__ RowSource* sources() const { return map_.sources() + warpgroup() * map_.max_rows; }

  // Only the epilogue needs them: they are copied to shared memory while the unit is multiplied. Not to
  // registers: before its first multiply a warp waits for every load that is to write one, for a microsecond where the
  // memory is busy.
  __device__ __forceinline__ void fetch_sources() const {
    static_assert(2 * sizeof(RowSource) == 16);
    const int row = 2 * thread_in_group();
    if (row < note().rows()) {
      ptx::copy_async_16(sources() + row, Group::own(args_.workspace.row_sources) + note().row_base + row, true);
    }
    ptx::commit_copies();
  }

  // A stage as the multiplies need it. Descriptors take a while to get to uniform registers: they are made before the
  // stage has landed.
  struct Stage {
    int index;
    wgmma::Descriptor weights;
    wgmma::Descriptor tokens;

    __device__ __forceinline__ Stage(const SharedMap<Orientation>& map, int stage, int first_plane)
        : index(stage), weights(map.weights(stage) + first_plane * kPlaneBytes), tokens(map.tokens(stage)) {}
  };

  // The activations have a scale for each half of a K block, so that down units have a partial sum for each half. A
  // step, what is multiplied and promoted at a time, is a K block, or with more tokens half of one: measured, and from
  // 40 tokens on a matter of registers.
  template <bool kDown>
  static constexpr int kStepParts = kDown && kN <= kMostTokensOfWholeSteps ? kActivationScalesPerBlock : 1;
  template <bool kDown>
  static constexpr int kStepsPerBlock = kDown ? kActivationScalesPerBlock / kStepParts<true> : 1;
  template <bool kDown>
  using Step = Partial[kStepParts<kDown>];

  // Only enqueues the multiplies.
  template <bool kDown>
  __device__ __forceinline__ void start(const Stage& stage, int step, uint32_t token_plane_bytes,
                                        Step<kDown>& partial) const {
    // Gate/up stages hold block after block, each with the planes of both warpgroups; down stages the other way round.
    constexpr int kPlanesPerBlock = kDown ? 1 : 2;
    constexpr int kPartsPerBlock = kStepsPerBlock<kDown> * kStepParts<kDown>;
    constexpr int kPartColumns = kBlockK / kPartsPerBlock;
    const int block = step / kStepsPerBlock<kDown>;
#pragma unroll
    for (Partial& part : partial) wgmma::pin(part);
    wgmma::fence();
#pragma unroll
    for (int part = 0; part < kStepParts<kDown>; ++part) {
      const int k_begin = (step * kStepParts<kDown> + part) % kPartsPerBlock * kPartColumns;
      wgmma::multiply_block<kN, kPartColumns / wgmma::kInstructionK>(partial[part], stage.weights,
                                                                     block * kPlanesPerBlock * kPlaneBytes + k_begin,
                                                                     stage.tokens, block * token_plane_bytes + k_begin);
    }
    wgmma::commit();
  }

  // Of a step: of the tokens, and of the low and the high rows of a fragment's weights.
  template <bool kDown>
  struct Scales {
    float2 token[kStepParts<kDown>][kTokenGroups];
    float2 weight;
  };

  template <bool kDown>
  __device__ __forceinline__ Scales<kDown> load_scales(const Stage& stage, int step) const {
    Scales<kDown> scales;
    const int padded = note().padded_rows();
    const float* token_scales = map_.token_scales(stage.index) + step * kStepParts<kDown> * padded + quad_token();
#pragma unroll
    for (int part = 0; part < kStepParts<kDown>; ++part) {
#pragma unroll
      for (int j = 0; j < kTokenGroups; ++j) {
        scales.token[part][j] = *reinterpret_cast<const float2*>(token_scales + part * padded + 8 * j);
      }
    }
    if constexpr (Format::kRowScales) {
      scales.weight = make_float2(1.0f, 1.0f);  // the epilogue has them
    } else {
      const int block = step / kStepsPerBlock<kDown>;
      const float* weight_scales = map_.header().weight_scale[stage.index];
      scales.weight = kDown ? make_float2(weight_scales[block], weight_scales[block])
                            : *reinterpret_cast<const float2*>(weight_scales + block * kScaleVectorFloats);
    }
    return scales;
  }

  // Waits until all but the latest step are multiplied and adds this one: acc += (token scale * weight scale) *
  // partial.
  template <bool kDown>
  __device__ __forceinline__ static void finish(const Scales<kDown>& scales, bool valid, Step<kDown>& partial,
                                                Partial& acc) {
    const float2 weight = valid ? scales.weight : make_float2(0.0f, 0.0f);
    wgmma::wait<1>();
#pragma unroll
    for (int part = 0; part < kStepParts<kDown>; ++part) {
      wgmma::pin(partial[part]);
#pragma unroll
      for (int j = 0; j < kTokenGroups; ++j) {
        const float2 token = scales.token[part][j];
        const float* sum = partial[part] + 4 * j;
        acc[4 * j + 0] = fmaf(token.x * weight.x, sum[0], acc[4 * j + 0]);
        acc[4 * j + 1] = fmaf(token.y * weight.x, sum[1], acc[4 * j + 1]);
        acc[4 * j + 2] = fmaf(token.x * weight.y, sum[2], acc[4 * j + 2]);
        acc[4 * j + 3] = fmaf(token.y * weight.y, sum[3], acc[4 * j + 3]);
      }
    }
  }

  // Two steps' partial sums take turns: while one is promoted, the tensor core fills the other, across stages too. The
  // last stage is followed by a step that nobody reads: its own loop iteration would double the code. Where the number
  // of K blocks is odd, the last stage has its block twice, and the copy counts for nothing.
  template <bool kDown>
  __device__ __forceinline__ void accumulate(StageCursor& cursor, Partial& acc) {
    if constexpr (Format::kDecodes) {
      constexpr bool kMayBeLone = kN == kLoneTokenRows && !kDown && kMayHaveLoneToken<Orientation, Group>;
      DecodedProduct<kN, Orientation, kDown, kMayBeLone>(args_, map_, note()).run(cursor, acc);
      return;
    }
    constexpr int kSteps = kStageBlocks * kStepsPerBlock<kDown>;
    static_assert(kSteps % 2 == 0, "a stage begins with the first of two sums and ends with the second");
    const int k_blocks = (kDown ? args_.problem.intermediate_size : args_.problem.hidden_size) / kBlockK;
    const int num_stages = Orientation::stages(k_blocks);
    const int first_plane = kDown ? warpgroup() * kStageBlocks : warpgroup();
    const uint32_t token_plane_bytes = ptx::uniform(note().padded_rows() * kBlockK);
    Step<kDown> sums[2];
    Scales<kDown> scales[2];
#pragma unroll
    for (float& value : acc) value = 0.0f;
    const auto issue = [&](const Stage& from, int step) {
      start<kDown>(from, step, token_plane_bytes, sums[step % 2]);
      scales[step % 2] = load_scales<kDown>(from, step);
    };
    Stage stage(map_, cursor.stage, first_plane);
    wait_stage(map_.header(), cursor);
    if constexpr (Format::kRowScales) keep_row_terms(map_, cursor.stage);
    issue(stage, 0);
#pragma unroll 1
    for (int i = 0; i < num_stages; ++i) {
      const bool whole = (i + 1) * kStageBlocks <= k_blocks;
      const auto add = [&](int step) {
        finish<kDown>(scales[step % 2], step < kStepsPerBlock<kDown> || whole, sums[step % 2], acc);
      };
      const Stage here = stage;
#pragma unroll
      for (int step = 1; step < kSteps - 1; ++step) {
        issue(here, step);
        add(step - 1);
      }
      issue(here, kSteps - 1);
      if (i < num_stages - 1) cursor.advance(map_.num_stages);
      stage = Stage(map_, cursor.stage, first_plane);
      const StageQuery next(map_.header(), cursor);
      add(kSteps - 2);
      next.wait();
      issue(stage, 0);
      add(kSteps - 1);
      release_stage<Orientation>(args_, map_.header(), here.index);
    }
    wgmma::wait<0>();
    cursor.advance(map_.num_stages);
  }

  // Calls `visit(j, sums)` for every token group j; its sums are the first four of `sums`. A rolled loop moves the next
  // group's to the front: that costs less than fetching instructions, which come from the same memory as the weights.
  // Decoding keeps the consumers busier than the memory, and there unrolled groups hide each other's latencies.
  template <bool kUnrolls = Format::kDecodes, typename Visit>
  __device__ __forceinline__ static void for_token_groups(Partial& acc, int rows, const Visit& visit) {
    if constexpr (kUnrolls) {
#pragma unroll
      for (int j = 0; j < kTokenGroups; ++j) visit(j, acc + 4 * j);
    } else {
#pragma unroll 1
      for (int j = 0; 8 * j < rows; ++j, rotate(acc)) visit(j, acc + 0);
    }
  }
  __device__ __forceinline__ static void rotate(Partial& acc) {
    const float front[4] = {acc[0], acc[1], acc[2], acc[3]};
#pragma unroll
    for (int i = 0; i + 4 < kN / 2; ++i) acc[i] = acc[i + 4];
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[kN / 2 - 4 + i] = front[i];
  }

  // Activation, routing weight, power-of-two scale over the unit's 64 columns, E4M3, into the chunk's activation image.
  __device__ __forceinline__ void finish_gate_up(Partial& acc) {
    const int consumer_warp = threadIdx.x / 32;
    const int padded = note().padded_rows();
    ptx::wait_copies<0>();  // the sources
    RowTerms row;
    if constexpr (Format::kRowScales) row = map_.quad_row_terms();
    const auto put_group = [&](int j, float* sums, const auto& activation) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if constexpr (Format::kRowScales) {
          sums[c] = row.low(sums[c]);
          sums[2 + c] = row.high(sums[2 + c]);
        }
        sums[c] = activation(sums[c], sums[2 + c]);
        float amax = fabsf(sums[c]);
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 4));
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 8));
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 16));
        if (quad_row() == 0) map_.row_amax()[consumer_warp * kN + 8 * j + quad_token() + c] = amax;
      }
    };
    const Activation& a = args_.activation;
    if constexpr (!Format::kDecodes) {
      for_token_groups(acc, kN, [&](int j, float* sums) {
        put_group(j, sums, [&](float gate, float up) { return activate(gate, up, a); });
      });
    } else if (a.beta != 0.0f) {
      for_token_groups<false>(acc, kN, [&](int j, float* sums) { put_group(j, sums, SiTu(a)); });
    } else {
      for_token_groups(acc, kN, [&](int j, float* sums) { put_group(j, sums, SwiGlu<false>(a)); });
    }
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);

    const int column = note().tile * kGateUpTileColumns + warpgroup() * 32 + warp_in_group() * 8;
    const Image image = activation_image<Orientation>(args_, note());
    uint8_t* plane = image.plane(column / kBlockK);
    float* scales = image.scales(note().tile);
    for_token_groups(acc, padded, [&](int j, const float* values) {
      float2 amax = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < kConsumerWarps; ++w) {
        const float2 other = *reinterpret_cast<const float2*>(map_.row_amax() + w * kN + 8 * j + quad_token());
        amax = make_float2(fmaxf(amax.x, other.x), fmaxf(amax.y, other.y));
      }
      // Multiplying by the weight after the maximum is exact: rounding is monotonic.
      const float weight[2] = {sources()[8 * j + quad_token()].weight, sources()[8 * j + quad_token() + 1].weight};
      const float scale[2] = {fp8::activation_scale(amax.x * fabsf(weight[0])),
                              fp8::activation_scale(amax.y * fabsf(weight[1]))};
      const uint32_t mine = fp8::pack2(values[0] * weight[0] * fp8::reciprocal_of_power_of_two(scale[0]),
                                       values[1] * weight[1] * fp8::reciprocal_of_power_of_two(scale[1]));
      store_activations(plane, column, j, mine);
      if (consumer_warp == 0 && quad_row() < 2) {
        const int token = 8 * j + quad_token() + quad_row();
        if (token < note().rows()) scales[token] = quad_row() == 0 ? scale[0] : scale[1];
      }
    });
    ptx::fence_proxy_async_global();  // the copy engine reads what was just written
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    if (threadIdx.x == 0) signaller_.post(map_.counters(args_).units_done(note().chunk));
  }

  // `mine` holds this lane's intermediate column for two tokens (low byte: the even token). Four lanes put four columns
  // of one token together; two of them store, a token each.
  __device__ __forceinline__ void store_activations(uint8_t* plane, int column, int j, uint32_t mine) const {
    const int r = quad_row();
    const uint32_t neighbour = __shfl_xor_sync(~0u, mine, 4);
    // bytes: (even token, columns r and r+1), (odd token, columns r and r+1)
    const uint32_t two = (r & 1) == 0 ? __byte_perm(mine, neighbour, 0x5140) : __byte_perm(neighbour, mine, 0x5140);
    const uint32_t other = __shfl_xor_sync(~0u, two, 8);
    const bool first = (r & 2) == 0;
    const uint32_t low = first ? two : other;
    const uint32_t high = first ? other : two;
    if ((r & 3) < 2) {
      const uint32_t word = (r & 1) == 0 ? __byte_perm(low, high, 0x5410) : __byte_perm(low, high, 0x7632);
      const int token = 8 * j + quad_token() + (r & 1);
      if (token < note().rows()) {
        const int first = column % kBlockK + (r & 4);
        ptx::store_keep(plane + swizzled_offset(token, Format::kDecodes ? transposed_column(first) : first), word);
      }
    }
  }

  // BF16 rows of this warpgroup's 64 hidden columns: put together in shared memory, since whole lines are what the
  // wires to other GPUs carry well.
  __device__ __forceinline__ void finish_down(Partial& acc) {
    const uint32_t barrier = kFirstWarpgroupBarrier + warpgroup();
    const int padded = note().padded_rows();
    uint8_t* tile = map_.down_tile(warpgroup());
    ptx::wait_copies<0>();  // the sources
    RowTerms row;
    if constexpr (Format::kRowScales) {
      row = map_.quad_row_terms();
      ptx::named_barrier_sync(barrier, kWarpgroupThreads);  // those that other threads have copied
    }
    const int tile_column = (warp_in_group() * 16 + 2 * quad_row()) * static_cast<int>(sizeof(uint16_t));
    for_token_groups(acc, padded, [&](int j, float* sums) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int token = 8 * j + quad_token() + c;
        if constexpr (Format::kRowScales) {
          // What padding tokens have here is dropped.
          const float weight = sources()[token].weight;
          sums[c] = row.low(sums[c], weight);
          sums[2 + c] = row.high(sums[2 + c], weight);
        }
        *reinterpret_cast<__nv_bfloat162*>(tile + swizzled_offset(token, tile_column)) =
            __floats2bfloat162_rn(sums[c], sums[2 + c]);
      }
    });
    ptx::named_barrier_sync(barrier, kWarpgroupThreads);
    constexpr int kLanesPerRow = kDownTileRowBytes / sizeof(uint4);
    const int piece = thread_in_group() % kLanesPerRow;
    const int column = note().tile * kDownUnitColumns + warpgroup() * kDownTileColumns + piece * 8;
#pragma unroll 1
    for (int token = thread_in_group() / kLanesPerRow; token < note().rows() && Group::has_tokens();
         token += kWarpgroupThreads / kLanesPerRow) {
      ptx::store(
          Group::slot_row(args_, sources()[token].route) + column,
          *reinterpret_cast<const uint4*>(tile + swizzled_offset(token, piece * static_cast<int>(sizeof(uint4)))),
          !Group::kHasPeers);
    }
    ptx::named_barrier_sync(barrier, kWarpgroupThreads);
    if (thread_in_group() == 0) signaller_.post(map_.counters(args_).down_done(note().tile));
  }

  const MoeArguments& args_;
  const SharedMap<Orientation>& map_;
  UnitNote note_;
  Signaller<Orientation>& signaller_;
  Tracer& tracer_;
};

}  // namespace megamoe
