// The two producers: one thread streams weights as fast as stages become free and waits for nothing else; the other adds
// the token images once they exist.
#pragma once

#include <cstdint>

#include "kernels/pipeline.cuh"
#include "kernels/trace.cuh"

namespace megamoe {

__device__ __forceinline__ int clamped_layer(const MoeArguments& args) {
  return args.num_layers == 1 ? 0 : min(max(__ldg(args.layer), 0), args.num_layers - 1);
}

// One thread. Takes units by ticket until none is left, so that a CTA that is slow for whatever reason takes fewer.
template <bool kSwap>
__device__ __forceinline__ void produce_weights(const MoeArguments& args, const UnitSchedule<kSwap>& schedule,
                                                const SharedMap<kSwap>& map, const CounterSet& counters) {
  using O = Orientation<kSwap>;
  const Problem& p = args.problem;
  SharedHeader* header = map.header;
  const int gate_up_blocks = p.hidden_size / kBlockK;
  const int down_blocks = p.intermediate_size / kBlockK;
  const int gate_up_tiles = p.intermediate_size / kGateUpTileColumns;
  const int down_tiles = p.hidden_size / kDownTileColumns;
  const int down_scale_entries = ceil_div(down_blocks, 2);
  const size_t first_expert = static_cast<size_t>(clamped_layer(args)) * p.num_experts;
  StageCursor cursor;
  Tracer tracer(args, TraceRole::kWeightProducer);

  auto claim = [&]() {
    ptx::mbarrier_wait(&header->empty[cursor.stage], cursor.parity ^ 1);
    return cursor.stage;
  };
  auto announce = [&](int stage) {
    ptx::mbarrier_arrive(&header->claimed[stage]);
    cursor.advance(map.num_stages);
  };

  uint32_t ticket = atomicAdd(counters.next_unit, 1);
  while (ticket < schedule.size()) {
    const Unit u = schedule.unit(ticket);
    tracer.mark(u.down ? TraceEvent::kDownAsked : TraceEvent::kGateUpAsked);
    const size_t expert = first_expert + u.expert;
    const int stages = u.down ? O::down_stages(p.intermediate_size) : O::gate_up_stages(p.hidden_size);
    for (int i = 0; i < stages; ++i) {
      const int stage = claim();
      if (i == 0) header->note[stage] = UnitNote::of(u);
      uint64_t* full = &header->full[stage];
      uint8_t* weights = map.weights(stage);
      const float* scale;
      if (!u.down) {
        const size_t block = (expert * gate_up_tiles + u.tile) * gate_up_blocks + i;
        ptx::mbarrier_arrive_expect_tx(full, kStageWeightBytes + kStageScaleFloats * sizeof(float));
        ptx::bulk_copy_global_to_shared(weights, args.gate_up + block * kStageWeightBytes, kStageWeightBytes, full);
        scale = args.gate_up_scale + block * kStageScaleFloats;
      } else if constexpr (kSwap) {
        const size_t tile = expert * down_tiles + u.tile;
        const int planes = min(2, down_blocks - 2 * i);
        ptx::mbarrier_arrive_expect_tx(full, planes * kPlaneBytes + kStageScaleFloats * sizeof(float));
        ptx::bulk_copy_global_to_shared(weights, args.down + (tile * down_blocks + 2 * i) * kPlaneBytes,
                                        planes * kPlaneBytes, full);
        scale = args.down_scale + (tile * down_scale_entries + i) * kStageScaleFloats;
      } else {
        const size_t tile = expert * down_tiles + 2 * u.tile;  // and its neighbour, in the same 128-row scale block
        ptx::mbarrier_arrive_expect_tx(full, kStageWeightBytes + kStageScaleFloats * sizeof(float));
        const uint8_t* plane = args.down + (tile * down_blocks + i) * kPlaneBytes;
        ptx::bulk_copy_global_to_shared(weights, plane, kPlaneBytes, full);
        ptx::bulk_copy_global_to_shared(weights + kPlaneBytes, plane + static_cast<size_t>(down_blocks) * kPlaneBytes,
                                        kPlaneBytes, full);
        scale = args.down_scale + (tile * down_scale_entries + i / 2) * kStageScaleFloats;
      }
      ptx::bulk_copy_global_to_shared(header->weight_scale[stage], scale, kStageScaleFloats * sizeof(float), full);
      announce(stage);
    }
    ticket = atomicAdd(counters.next_unit, 1);
  }
  const int stage = claim();
  header->note[stage].tile = UnitNote::kEnd;
  ptx::mbarrier_arrive(&header->full[stage]);
  announce(stage);
}

// One thread. Gate/up units need all tokens gathered, down units need the activations of their chunk.
template <bool kSwap>
__device__ __forceinline__ void produce_tokens(const MoeArguments& args, const SharedMap<kSwap>& map,
                                               const CounterSet& counters) {
  using O = Orientation<kSwap>;
  const Problem& p = args.problem;
  SharedHeader* header = map.header;
  const uint32_t gate_up_units = O::gate_up_units(p.intermediate_size);
  bool tokens_ready = false;
  Tracer tracer(args, TraceRole::kTokenProducer);
  StageCursor cursor;
  while (true) {
    ptx::mbarrier_wait(&header->claimed[cursor.stage], cursor.parity);
    const UnitNote note = header->note[cursor.stage];
    if (note.end()) {
      ptx::mbarrier_arrive(&header->full[cursor.stage]);
      return;
    }
    if (!note.down()) {
      if (!tokens_ready) ptx::wait_until_at_least(counters.quantized_ctas, gridDim.x);
      tokens_ready = true;
    } else {
      ptx::wait_until_at_least(&counters.gate_up_done[note.chunk], gate_up_units);
    }
    ptx::fence_proxy_async_global();
    tracer.mark(TraceEvent::kTokensReady);

    const int rows = note.padded_rows();
    const int k = note.down() ? p.intermediate_size : p.hidden_size;
    const int k_blocks = k / kBlockK;
    const int scales_per_block = note.down() ? kBlockK / kActivationScaleColumns : 1;
    const int blocks_per_stage = note.down() ? O::kDownStageBlocks : 1;
    const uint8_t* planes = (note.down() ? args.workspace.activation_planes : args.workspace.token_planes) +
                            static_cast<size_t>(note.row_base) * k;
    const float* scales = (note.down() ? args.workspace.activation_scales : args.workspace.token_scales) +
                          static_cast<size_t>(note.row_base) * k_blocks * scales_per_block;
    for (int block = 0; block < k_blocks; block += blocks_per_stage) {
      if (block != 0) ptx::mbarrier_wait(&header->claimed[cursor.stage], cursor.parity);
      const int blocks = min(blocks_per_stage, k_blocks - block);
      const uint32_t plane_bytes = blocks * rows * kBlockK;
      const uint32_t scale_bytes = blocks * scales_per_block * rows * sizeof(float);
      uint64_t* full = &header->full[cursor.stage];
      ptx::mbarrier_arrive_expect_tx(full, plane_bytes + scale_bytes);
      ptx::bulk_copy_global_to_shared(map.tokens(cursor.stage), planes + static_cast<size_t>(block) * rows * kBlockK,
                                      plane_bytes, full);
      ptx::bulk_copy_global_to_shared(map.token_scales(cursor.stage),
                                      scales + static_cast<size_t>(block) * scales_per_block * rows, scale_bytes, full);
      cursor.advance(map.num_stages);
    }
  }
}

}  // namespace megamoe
