// swapAB consumers: weights on the WGMMA M dimension, a chunk's tokens (padded to eight) on N.
// Accumulator fragment: thread (warp w, lane l) of a warpgroup holds, for every 8 tokens j, rows 16w + l/4 and + 8 of tokens
// 8j + 2*(l%4) and + 1. The weight layout puts gate and up (or two neighbouring hidden columns) into such a row pair.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/fp8.cuh"
#include "common/wgmma.cuh"
#include "kernels/gather.cuh"
#include "kernels/pipeline.cuh"
#include "kernels/swiglu.cuh"

namespace megamoe {

template <int kN>
class SwapConsumer {
 public:
  __device__ __forceinline__ SwapConsumer(const MoeArguments& args, const SharedMap<true>& map,
                                          const CounterSet& counters, const UnitNote& note, Signaller& signaller)
      : args_(args), map_(map), counters_(counters), note_(note), signaller_(signaller) {
    // Needed by the epilogue only: the load is on its way while the main loop runs. L2 only: another SM wrote it.
    if (threadIdx.x < note.rows()) {
      const int2 raw = __ldcg(reinterpret_cast<const int2*>(args.workspace.row_sources + note.row_base + threadIdx.x));
      source_ = {raw.x, __int_as_float(raw.y)};
    }
  }

  __device__ __forceinline__ void run(StageCursor& cursor) {
    float acc[kN / 2];
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[i] = 0.0f;
    if (note_.down()) {
      accumulate_down(cursor, acc);
      finish_down(acc);
    } else {
      accumulate_gate_up(cursor, acc);
      finish_gate_up(acc);
    }
  }

 private:
  static constexpr int kTokenGroups = kN / 8;

  __device__ static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  __device__ static int warp_in_group() { return threadIdx.x / 32 % 4; }
  __device__ static int quad_row() { return threadIdx.x % 32 / 4; }   // l/4
  __device__ static int quad_token() { return threadIdx.x % 4 * 2; }  // 2*(l%4)

  // acc += (token scale * weight scale) * partial. The low rows and the high rows may have scales of their own.
  __device__ __forceinline__ static void promote(float (&acc)[kN / 2], const float (&partial)[kN / 2],
                                                 const float2 (&token)[kTokenGroups], float weight_low,
                                                 float weight_high) {
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
      acc[4 * j + 0] = fmaf(token[j].x * weight_low, partial[4 * j + 0], acc[4 * j + 0]);
      acc[4 * j + 1] = fmaf(token[j].y * weight_low, partial[4 * j + 1], acc[4 * j + 1]);
      acc[4 * j + 2] = fmaf(token[j].x * weight_high, partial[4 * j + 2], acc[4 * j + 2]);
      acc[4 * j + 3] = fmaf(token[j].y * weight_high, partial[4 * j + 3], acc[4 * j + 3]);
    }
  }

  __device__ __forceinline__ static void load_scales(float2 (&scales)[kTokenGroups], const float* row) {
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
      scales[j] = *reinterpret_cast<const float2*>(row + 8 * j + quad_token());
    }
  }

  // Each warpgroup multiplies its 64 rows (32 gate, 32 up) by the stage's K block.
  __device__ __forceinline__ void accumulate_gate_up(StageCursor& cursor, float (&acc)[kN / 2]) {
    const int stages = Orientation<true>::gate_up_stages(args_.problem.hidden_size);
    for (int i = 0; i < stages; ++i) {
      const int stage = cursor.stage;
      ptx::mbarrier_wait(&map_.header->full[stage], cursor.parity);
      const uint64_t a = wgmma::make_descriptor(map_.weights(stage) + warpgroup() * kPlaneBytes);
      const uint64_t b = wgmma::make_descriptor(map_.tokens(stage));
      float partial[kN / 2];
      wgmma::pin(partial);
      wgmma::fence();
      wgmma::multiply_block<kN, 4>(partial, a, b);
      wgmma::commit();
      float2 token_scales[kTokenGroups];
      load_scales(token_scales, map_.token_scales(stage));
      const float2 weight_scale = *reinterpret_cast<const float2*>(map_.header->weight_scale[stage]);
      wgmma::wait<0>();
      wgmma::pin(partial);
      release_stage(map_.header, stage);
      promote(acc, partial, token_scales, weight_scale.x, weight_scale.y);
      cursor.advance(map_.num_stages);
    }
  }

  // Both warpgroups multiply the same 64 rows, each by its own K block of the stage; the activations have two scales per block.
  __device__ __forceinline__ void accumulate_down(StageCursor& cursor, float (&acc)[kN / 2]) {
    const int k_blocks = args_.problem.intermediate_size / kBlockK;
    const int stages = Orientation<true>::down_stages(args_.problem.intermediate_size);
    for (int i = 0; i < stages; ++i) {
      const int stage = cursor.stage;
      ptx::mbarrier_wait(&map_.header->full[stage], cursor.parity);
      if (2 * i + warpgroup() < k_blocks) {
        const uint64_t a = wgmma::make_descriptor(map_.weights(stage) + warpgroup() * kPlaneBytes);
        const uint64_t b = wgmma::make_descriptor(map_.tokens(stage) + warpgroup() * kN * kBlockK);
        float low[kN / 2], high[kN / 2];
        wgmma::pin(low);
        wgmma::pin(high);
        wgmma::fence();
        wgmma::multiply_block<kN, 2>(low, a, b);
        wgmma::commit();
        wgmma::multiply_block<kN, 2>(high, a, b, kBlockK / 2);
        wgmma::commit();
        const float* scale_rows = map_.token_scales(stage) + 2 * warpgroup() * kN;
        const float weight_scale = map_.header->weight_scale[stage][warpgroup()];
        float2 token_scales[kTokenGroups];
        load_scales(token_scales, scale_rows);
        wgmma::wait<1>();
        wgmma::pin(low);
        promote(acc, low, token_scales, weight_scale, weight_scale);
        load_scales(token_scales, scale_rows + kN);
        wgmma::wait<0>();
        wgmma::pin(high);
        release_stage(map_.header, stage);
        promote(acc, high, token_scales, weight_scale, weight_scale);
      } else {
        release_stage(map_.header, stage);
      }
      cursor.advance(map_.num_stages);
    }
  }

  // SwiGLU, routing weight, power-of-two scale over the unit's 64 columns, E4M3, into the chunk's activation image.
  __device__ __forceinline__ void finish_gate_up(const float (&acc)[kN / 2]) {
    const int consumer_warp = threadIdx.x / 32;
    if (threadIdx.x < note_.rows()) map_.sources[threadIdx.x] = source_;

    float value[kN / 4];  // [token group][two tokens]
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float v = swiglu(acc[4 * j + c], acc[4 * j + 2 + c], args_.activation_clamp);
        value[2 * j + c] = v;
        float amax = fabsf(v);
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 4));
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 8));
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 16));
        if (quad_row() == 0) map_.row_amax[consumer_warp * kN + 8 * j + quad_token() + c] = amax;
      }
    }
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);

    const Problem& p = args_.problem;
    const int column = note_.tile * kGateUpTileColumns + warpgroup() * 32 + warp_in_group() * 8;
    uint8_t* plane = args_.workspace.activation_planes + static_cast<size_t>(note_.row_base) * p.intermediate_size +
                     static_cast<size_t>(column / kBlockK) * kN * kBlockK;
    float* scales = args_.workspace.activation_scales +
                    static_cast<size_t>(note_.row_base) * (p.intermediate_size / kActivationScaleColumns) +
                    static_cast<size_t>(note_.tile) * kN;
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
      float2 amax = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < kConsumerWarps; ++w) {
        const float2 other = *reinterpret_cast<const float2*>(map_.row_amax + w * kN + 8 * j + quad_token());
        amax = make_float2(fmaxf(amax.x, other.x), fmaxf(amax.y, other.y));
      }
      // Multiplying by the weight after the maximum is exact: rounding is monotonic.
      const float weight[2] = {map_.sources[8 * j + quad_token()].weight,
                               map_.sources[8 * j + quad_token() + 1].weight};
      const float scale[2] = {fp8::activation_scale(amax.x * fabsf(weight[0])),
                              fp8::activation_scale(amax.y * fabsf(weight[1]))};
      const uint32_t mine = fp8::pack2(value[2 * j] * weight[0] * fp8::reciprocal_of_power_of_two(scale[0]),
                                       value[2 * j + 1] * weight[1] * fp8::reciprocal_of_power_of_two(scale[1]));
      store_activations(plane, column, j, mine);
      if (consumer_warp == 0 && quad_row() < 2) {
        const int token = 8 * j + quad_token() + quad_row();
        if (token < note_.rows()) scales[token] = quad_row() == 0 ? scale[0] : scale[1];
      }
    }
    ptx::fence_proxy_async_global();  // the copy engine reads what was just written
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    if (threadIdx.x == 0) signaller_.post(&counters_.gate_up_done[note_.chunk]);
  }

  // `mine` holds this lane's intermediate column for two tokens (low byte: the even token). Four lanes put four columns of
  // one token together; two of them store, a token each.
  __device__ __forceinline__ void store_activations(uint8_t* plane, int column, int j, uint32_t mine) const {
    const int r = quad_row();
    const uint32_t neighbour = __shfl_xor_sync(~0u, mine, 4);
    // bytes: (even token, columns r and r+1), (odd token, columns r and r+1)
    const uint32_t pair = (r & 1) == 0 ? __byte_perm(mine, neighbour, 0x5140) : __byte_perm(neighbour, mine, 0x5140);
    const uint32_t other = __shfl_xor_sync(~0u, pair, 8);
    const bool first = (r & 2) == 0;
    const uint32_t low = first ? pair : other;
    const uint32_t high = first ? other : pair;
    if ((r & 3) < 2) {
      const uint32_t word = (r & 1) == 0 ? __byte_perm(low, high, 0x5410) : __byte_perm(low, high, 0x7632);
      const int token = 8 * j + quad_token() + (r & 1);
      if (token < note_.rows()) {
        *reinterpret_cast<uint32_t*>(plane + swizzled_offset(token, column % kBlockK + (r & 4))) = word;
      }
    }
  }

  // Warpgroup 0 adds warpgroup 1's half of K and stores BF16 rows; warpgroup 1 goes on to the next unit.
  __device__ __forceinline__ void finish_down(const float (&acc)[kN / 2]) {
    const int thread = threadIdx.x % kWarpgroupThreads;
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);  // the previous unit's half has been read
    if (warpgroup() == 1) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) map_.partial[i * kWarpgroupThreads + thread] = acc[i];
    } else if (threadIdx.x < note_.rows()) {
      map_.sources[threadIdx.x] = source_;
    }
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    if (warpgroup() == 1) return;
    const int column = note_.tile * kDownTileColumns + warp_in_group() * 16 + 2 * quad_row();
#pragma unroll
    for (int j = 0; j < kTokenGroups; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int token = 8 * j + quad_token() + c;
        if (token >= note_.rows()) continue;
        const float low = acc[4 * j + c] + map_.partial[(4 * j + c) * kWarpgroupThreads + thread];
        const float high = acc[4 * j + 2 + c] + map_.partial[(4 * j + 2 + c) * kWarpgroupThreads + thread];
        uint16_t* row =
            args_.workspace.slot_outputs + static_cast<size_t>(map_.sources[token].pair) * args_.problem.hidden_size;
        *reinterpret_cast<__nv_bfloat162*>(row + column) = __floats2bfloat162_rn(low, high);
      }
    }
    ptx::named_barrier_sync(kFirstWarpgroupBarrier, kWarpgroupThreads);
    if (threadIdx.x == 0) signaller_.post(&counters_.down_tiles_done[note_.tile]);
  }

  const MoeArguments& args_;
  const SharedMap<true>& map_;
  const CounterSet& counters_;
  UnitNote note_;
  Signaller& signaller_;
  RowSource source_{0, 0.0f};
};

template <int kGroups>
__device__ __forceinline__ void dispatch_swap_unit(const MoeArguments& args, const SharedMap<true>& map,
                                                   const CounterSet& counters, const UnitNote& note,
                                                   Signaller& signaller, StageCursor& cursor) {
  if (note.padded_rows() == 8 * kGroups) {
    SwapConsumer<8 * kGroups>(args, map, counters, note, signaller).run(cursor);
  } else if constexpr (kGroups < kSwapTokenTile / 8) {
    dispatch_swap_unit<kGroups + 1>(args, map, counters, note, signaller, cursor);
  }
}

}  // namespace megamoe
