#pragma once

#include "host/orientation_launcher.h"
#include "kernels/moe_sm90.cuh"

namespace megamoe {

template <bool kSwap>
cudaError_t OrientationLauncher<kSwap>::prepare() {
  return cudaFuncSetAttribute(moe_sm90<kSwap>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

template <bool kSwap>
LaunchConstants launch_constants(const Problem& p, Control* control, int num_ctas) {
  LaunchConstants c;
  for (int set = 0; set < 2; ++set) c.counters[set] = CounterSet(p, control, set);
  c.counter_words = CounterSet::words(p);
  c.gather_blocks = Divisor(ceil_div(p.hidden_size, kGatherColumns));
  c.gather_items_per_cta = ceil_div(p.num_tokens * static_cast<int>(c.gather_blocks.value()), num_ctas);
  c.gate_up_units = Divisor(p.intermediate_size / (kGateUpTileColumns * Orientation<kSwap>::kUnitTiles));
  c.down_units = Divisor(ceil_div(p.hidden_size, kDownUnitColumns * Orientation<kSwap>::kUnitTiles));
  for (int rows = 8; rows <= Orientation<kSwap>::kTokenTile; rows += 8) {
    c.stages[rows / 8 - 1] = static_cast<uint8_t>(SharedMap<kSwap>::stages_that_fit(p.num_experts, rows));
  }
  return c;
}

template <bool kSwap>
cudaError_t OrientationLauncher<kSwap>::launch(const MoeArguments& arguments, int num_ctas, cudaStream_t stream) {
  MoeArguments complete = arguments;
  complete.constants = launch_constants<kSwap>(arguments.problem, arguments.control, num_ctas);
  moe_sm90<kSwap><<<num_ctas, kCtaThreads, kSharedBytes, stream>>>(complete);
  return cudaGetLastError();
}

}  // namespace megamoe
