// Normal orientation: 128 gathered tokens on the WGMMA M dimension (64 per warpgroup), 128 weight rows on N.
// Accumulator fragment: thread (warp w, lane l) holds tokens 16w + l/4 and + 8; for every 8 weight rows b, rows 8b + 2*(l%4)
// and + 1. In the weight layout even b are gate rows and odd b the matching up rows; for the down projection rows q of block
// 2g and q of block 2g + 1 are neighbouring hidden columns.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/fp8.cuh"
#include "common/wgmma.cuh"
#include "kernels/gather.cuh"
#include "kernels/pipeline.cuh"
#include "kernels/swiglu.cuh"
#include "kernels/trace.cuh"

namespace megamoe {

template <typename Group>
class NormalConsumer {
 public:
  __device__ __forceinline__ NormalConsumer(const MoeArguments& args, const SharedMap<false>& map, const UnitNote& note,
                                            Signaller& signaller, Tracer& tracer)
      : args_(args), map_(map), note_(note), signaller_(signaller), tracer_(tracer) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first_token() + 8 * half;
      if (token < note.rows()) {
        const int2 raw = __ldcg(reinterpret_cast<const int2*>(args.workspace.row_sources + note.row_base + token));
        source_[half] = {raw.x, __int_as_float(raw.y)};
      }
    }
  }

  __device__ __forceinline__ void run(StageCursor& cursor) {
    float acc[kAccumulators];
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) acc[i] = 0.0f;
    if (note_.down()) {
      accumulate<true>(cursor, acc);
      if (threadIdx.x == 0) tracer_.mark(TraceEvent::kUnitMultiplied);
      finish_down(acc);
    } else {
      accumulate<false>(cursor, acc);
      if (threadIdx.x == 0) tracer_.mark(TraceEvent::kUnitMultiplied);
      finish_gate_up(acc);
    }
  }

 private:
  static constexpr int kN = 2 * kPlaneRows;
  static constexpr int kAccumulators = kN / 2;
  static constexpr int kWarpgroupTokens = 64;

  __device__ static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  __device__ static int first_token() {
    return warpgroup() * kWarpgroupTokens + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }
  __device__ static int quad_column() { return threadIdx.x % 4 * 2; }

  // acc += (token scale * weight scale) * partial; weight blocks of eight rows alternate between two scales.
  __device__ __forceinline__ static void promote(float (&acc)[kAccumulators], const float (&partial)[kAccumulators],
                                                 const float (&token)[2], float weight_even, float weight_odd) {
    const float scale[2][2] = {{token[0] * weight_even, token[1] * weight_even},
                               {token[0] * weight_odd, token[1] * weight_odd}};
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) acc[i] = fmaf(scale[i / 4 % 2][i / 2 % 2], partial[i], acc[i]);
  }

  template <bool kDown>
  __device__ __forceinline__ void accumulate(StageCursor& cursor, float (&acc)[kAccumulators]) {
    using O = Orientation<false>;
    constexpr int kScales = kDown ? kActivationScalesPerBlock : 1;
    const Problem& p = args_.problem;
    const int stages = O::stages((kDown ? p.intermediate_size : p.hidden_size) / kBlockK);
    static_assert(O::kStageBlocks == 1);
    const bool idle = warpgroup() * kWarpgroupTokens >= note_.rows();
    const int padded = note_.padded_rows();
    for (int i = 0; i < stages; ++i) {
      const int stage = cursor.stage;
      wait_stage(map_.header(), cursor);
      if (!idle) {
        const wgmma::Descriptor a(map_.tokens(stage) + warpgroup() * kWarpgroupTokens * kBlockK);
        const wgmma::Descriptor b(map_.weights(stage));
        const float* weight_scale = map_.header().weight_scale[stage];
        const float even = weight_scale[kDown ? i % 2 : 0];
        const float odd = weight_scale[kDown ? i % 2 : 1];
#pragma unroll
        for (int s = 0; s < kScales; ++s) {
          float partial[kAccumulators];
          wgmma::pin(partial);
          wgmma::fence();
          wgmma::multiply_block<kN, 4 / kScales>(partial, a, s * kActivationScaleColumns, b,
                                                 s * kActivationScaleColumns);
          wgmma::commit();
          const float* scale_row = map_.token_scales(stage) + s * padded + first_token();
          const float token_scales[2] = {scale_row[0], scale_row[8]};
          wgmma::wait<0>();
          wgmma::pin(partial);
          if (s == kScales - 1) release_stage(map_.header(), stage);
          promote(acc, partial, token_scales, even, odd);
        }
      } else {
        release_stage(map_.header(), stage);
      }
      cursor.advance(map_.num_stages);
    }
  }

  __device__ __forceinline__ void finish_gate_up(const float (&acc)[kAccumulators]) {
    const Problem& p = args_.problem;
    const int padded = note_.padded_rows();
    const int column = note_.tile * kGateUpTileColumns;
    uint8_t* plane = args_.workspace.activation_planes + static_cast<size_t>(note_.row_base) * p.intermediate_size +
                     static_cast<size_t>(column / kBlockK) * padded * kBlockK;
    float* scales = args_.workspace.activation_scales +
                    static_cast<size_t>(note_.row_base) * (p.intermediate_size / kActivationScaleColumns) +
                    static_cast<size_t>(note_.tile) * padded;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first_token() + 8 * half;
      float value[16];
      float amax = 0.0f;
#pragma unroll
      for (int q = 0; q < 8; ++q) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float v = swiglu(acc[8 * q + 2 * half + c], acc[8 * q + 4 + 2 * half + c], args_.activation_clamp) *
                          source_[half].weight;
          value[2 * q + c] = v;
          amax = fmaxf(amax, fabsf(v));
        }
      }
      amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1));
      amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2));
      if (token >= note_.rows()) continue;
      const float scale = fp8::activation_scale(amax);
      const float inverse = fp8::reciprocal_of_power_of_two(scale);
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        *reinterpret_cast<uint16_t*>(plane + swizzled_offset(token, column % kBlockK + 8 * q + quad_column())) =
            fp8::pack2(value[2 * q] * inverse, value[2 * q + 1] * inverse);
      }
      if (quad_column() == 0) scales[token] = scale;
    }
    ptx::fence_proxy_async_global();  // the copy engine reads what was just written
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    if (threadIdx.x == 0) signaller_.post(map_.counters(args_).gate_up_done(note_.chunk));
  }

  __device__ __forceinline__ void finish_down(const float (&acc)[kAccumulators]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first_token() + 8 * half >= note_.rows()) continue;
      uint16_t* row = Group::slot_row(args_, source_[half].pair) + note_.tile * kDownUnitColumns + 2 * quad_column();
#pragma unroll
      for (int g = 0; g < 8; ++g) {  // sixteen hidden columns each
        const int even = 8 * g + 2 * half, odd = 8 * g + 4 + 2 * half;
        const __nv_bfloat162 first = __floats2bfloat162_rn(acc[even], acc[odd]);
        const __nv_bfloat162 second = __floats2bfloat162_rn(acc[even + 1], acc[odd + 1]);
        *reinterpret_cast<uint2*>(row + 16 * g) =
            make_uint2(*reinterpret_cast<const uint32_t*>(&first), *reinterpret_cast<const uint32_t*>(&second));
      }
    }
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    if (threadIdx.x == 0) signaller_.post(map_.counters(args_).down_done(note_.tile));
  }

  const MoeArguments& args_;
  const SharedMap<false>& map_;
  UnitNote note_;
  Signaller& signaller_;
  Tracer& tracer_;
  RowSource source_[2] = {{0, 0.0f}, {0, 0.0f}};
};

}  // namespace megamoe
