#pragma once

#include <algorithm>

#include "host/launchers.h"
#include "host/memory.h"
#include "kernels/moe_sm90.cuh"

namespace megamoe {

// Pairs of CTAs share the weights of experts that have several chunks of tokens.
template <bool kSwap>
int cluster_ctas(const Problem& p, int num_ctas) {
#ifdef MEGAMOE_PAIRS
  return kSwap ? 1 : MEGAMOE_PAIRS;
#else
  return !kSwap && num_ctas % 2 == 0 && p.num_pairs() >= kLeastPairsPerExpertOfTwoCtas * p.num_experts ? 2 : 1;
#endif
}

// Of `cluster` CTAs each.
template <typename Arguments>
cudaError_t launch_clusters(void (*kernel)(Arguments), const Arguments& arguments, dim3 ctas, int cluster,
                            cudaStream_t stream) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = ctas;
  config.blockDim = dim3(kCtaThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <bool kSwap>
LaunchConstants launch_constants(const MoeArguments& arguments, int num_ctas) {
  const Problem& p = arguments.problem;
  LaunchConstants c;
  for (int set = 0; set < 2; ++set) c.counters[set] = CounterSet(p, arguments.control, set, arguments.counter_words);
  c.gather_blocks = Divisor(ceil_div(p.hidden_size, kGatherColumns));
  c.gather_items_per_cta = ceil_div(p.num_tokens * static_cast<int>(c.gather_blocks.value()), num_ctas);
  c.gate_up_units = Divisor(p.intermediate_size / (kGateUpTileColumns * Orientation<kSwap>::kUnitTiles));
  c.down_units = Divisor(ceil_div(p.hidden_size, kDownUnitColumns * Orientation<kSwap>::kUnitTiles));
  c.cluster_ctas = cluster_ctas<kSwap>(p, num_ctas);
  c.gate_up_tickets = Divisor(ceil_div(c.gate_up_units.value(), c.cluster_ctas));
  c.down_tickets = Divisor(ceil_div(c.down_units.value(), c.cluster_ctas));
  const Plan plan(p.num_experts, p.num_ranks, 0);
  for (int rows = 8; rows <= Orientation<kSwap>::kTokenTile; rows += 8) {
    c.stages[rows / 8 - 1] = static_cast<uint8_t>(SharedMap<kSwap>::stages_that_fit(plan, rows));
  }
  const int wanted = ceil_div(weight_bytes_in_flight(), Orientation<kSwap>::kStageWeightBytes);
  c.stages_in_flight = std::min<int>(wanted, c.stages[Orientation<kSwap>::kTokenTile / 8 - 1]);
  return c;
}

template <bool kSwap, typename Group>
cudaError_t Launcher<kSwap, Group>::prepare() {
  return cudaFuncSetAttribute(moe_sm90<kSwap, Group>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

template <bool kSwap, typename Group>
cudaError_t Launcher<kSwap, Group>::launch(const MoeArguments& arguments, int num_ctas, cudaStream_t stream) {
  MoeArguments complete = arguments;
  complete.constants = launch_constants<kSwap>(arguments, num_ctas);
  return launch_clusters(moe_sm90<kSwap, Group>, complete, dim3(num_ctas), complete.constants.cluster_ctas, stream);
}

template <bool kSwap>
cudaError_t VirtualRanksLauncher<kSwap>::prepare() {
  return cudaFuncSetAttribute(moe_virtual_ranks<kSwap>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

template <bool kSwap>
cudaError_t VirtualRanksLauncher<kSwap>::launch(const VirtualRanksArguments& arguments, int num_ranks,
                                                int ctas_per_rank, cudaStream_t stream) {
  VirtualRanksArguments complete = arguments;
  for (int r = 0; r < num_ranks; ++r) {
    MoeArguments& one = complete.of_rank[r];
    one.constants = launch_constants<kSwap>(one, ctas_per_rank);
  }
  return launch_clusters(moe_virtual_ranks<kSwap>, complete, dim3(ctas_per_rank, num_ranks),
                         complete.of_rank[0].constants.cluster_ctas, stream);
}

}  // namespace megamoe
