#pragma once

#include <algorithm>

#include "host/launchers.h"
#include "host/memory.h"
#include "host/per_device.h"
#include "kernels/moe_sm90.cuh"

namespace megamoe {

// One launch, as clusters of `cluster` CTAs.
class ClusterLaunch {
 public:
  ClusterLaunch(dim3 ctas, int cluster, cudaStream_t stream) {
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config_.gridDim = ctas;
    config_.blockDim = dim3(kCtaThreads);
    config_.dynamicSmemBytes = kSharedBytes;
    config_.stream = stream;
    config_.attrs = &attribute_;
    config_.numAttrs = cluster > 1 ? 1 : 0;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
  const cudaLaunchConfig_t& config() const { return config_; }

  template <typename Arguments>
  cudaError_t run(void (*kernel)(Arguments), const Arguments& arguments) const {
    if (config_.gridDim.x > kMaxCtas) return cudaErrorInvalidConfiguration;
    const cudaError_t error = cudaLaunchKernelEx(&config_, kernel, arguments);
    cudaGetLastError();  // the caller has it now; nobody else finds it
    return error;
  }

 private:
  cudaLaunchAttribute attribute_ = {};
  cudaLaunchConfig_t config_ = {};
};

// Whether `ctas` CTAs run at the same time as pairs, as their waits for each other need.
template <auto kKernel>
bool pairs_run_together(int ctas) {
  static PerDevice pairs_and_one_more;
  const auto ask = [](int) {
    const ClusterLaunch launch(dim3(2), 2, nullptr);
    int pairs = 0;
    if (cudaOccupancyMaxActiveClusters(&pairs, kKernel, &launch.config()) == cudaSuccess) return pairs + 1;
    cudaGetLastError();  // a device without clusters is no error of the launch that follows
    return 1;
  };
  return ctas <= 2 * (pairs_and_one_more.get(ask, 1) - 1);
}

// Pairs of CTAs share the weights of experts that have several chunks of tokens. `rows`: of CTAs, in one launch.
template <typename Orientation, auto kKernel>
int cluster_ctas(const Problem& p, int num_ctas, int rows) {
  const bool wanted = !Orientation::kSwapsOperands && p.num_routes() >= kLeastPairsPerExpertOfTwoCtas * p.num_experts;
  return wanted && num_ctas % 2 == 0 && pairs_run_together<kKernel>(num_ctas * rows) ? 2 : 1;
}

// The normal orientation with a chunk for most experts and more time for its weights than for its multiplies.
inline bool waits_for_memory(const Problem& p) {
  return p.num_routes() <= most_pairs_per_expert_waiting() * p.num_experts;
}

// With fewer units than SMs nothing hides that rows are found late.
template <typename Orientation, typename Group>
bool gathers_rows(const Problem& p) {
  return kMayGatherRows<Orientation, Group> && waits_for_memory(p) && p.normal_units() >= kSms;
}

// With more gate/up weights, activations have left the L2 before their down units come, whatever it is told; measured.
template <typename Orientation>
bool activations_stay(const Problem& p) {
  constexpr size_t kMostGateUpBytes = 1 << 30;
  const size_t bytes = size_t{2} * p.num_experts * p.intermediate_size * p.hidden_size;
  return !Orientation::kSwapsOperands && waits_for_memory(p) && bytes <= kMostGateUpBytes;
}

template <typename Orientation, typename Group>
LaunchConstants launch_constants(const MoeArguments& arguments, int num_ctas, int cluster_ctas) {
  const Problem& p = arguments.problem;
  LaunchConstants c;
  for (int set = 0; set < 2; ++set) c.counters[set] = CounterSet(p, arguments.control, set, arguments.counter_words);
  c.dispatch_blocks = Divisor(ceil_div(p.hidden_size, Orientation::kDispatchColumns));
  c.dispatch_items_per_cta = ceil_div(p.num_tokens * static_cast<int>(c.dispatch_blocks.value()), num_ctas);
  c.gate_up_units = Divisor(p.intermediate_size / (kGateUpTileColumns * Orientation::kUnitTiles));
  c.down_units = Divisor(ceil_div(p.hidden_size, kDownUnitColumns * Orientation::kUnitTiles));
  c.cluster_ctas = cluster_ctas;
  c.gate_up_tickets = Divisor(ceil_div(c.gate_up_units.value(), cluster_ctas));
  c.down_tickets = Divisor(ceil_div(c.down_units.value(), cluster_ctas));
  c.gathers_rows = gathers_rows<Orientation, Group>(p);
  c.activations_stay = activations_stay<Orientation>(p);
  const Plan plan(p.num_experts, p.num_ranks, 0);
  for (int rows = 8; rows <= Orientation::kTokenTile; rows += 8) {
    c.stages[rows / 8 - 1] = static_cast<uint8_t>(SharedMap<Orientation>::stages_that_fit(plan, rows));
  }
  const int wanted = ceil_div(weight_bytes_in_flight(), Orientation::kStageWeightBytes);
  c.stages_in_flight = std::min<int>(wanted, c.stages[Orientation::kTokenTile / 8 - 1]);
  return c;
}

template <typename Orientation, typename Group>
cudaError_t Launcher<Orientation, Group>::prepare() {
  return cudaFuncSetAttribute(moe_sm90<Orientation, Group>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

template <typename Orientation, typename Group>
cudaError_t Launcher<Orientation, Group>::launch(const MoeArguments& arguments, int num_ctas, cudaStream_t stream) {
  constexpr auto kKernel = moe_sm90<Orientation, Group>;
  const int cluster = cluster_ctas<Orientation, kKernel>(arguments.problem, num_ctas, 1);
  MoeArguments complete = arguments;
  complete.constants = launch_constants<Orientation, Group>(arguments, num_ctas, cluster);
  return ClusterLaunch(dim3(num_ctas), cluster, stream).run(kKernel, complete);
}

template <typename Orientation>
cudaError_t VirtualRanksLauncher<Orientation>::prepare() {
  return cudaFuncSetAttribute(moe_virtual_ranks<Orientation>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kSharedBytes);
}

template <typename Orientation>
cudaError_t VirtualRanksLauncher<Orientation>::launch(const VirtualRanksArguments& arguments, int num_ranks,
                                                      int ctas_per_rank, cudaStream_t stream) {
  constexpr auto kKernel = moe_virtual_ranks<Orientation>;
  const int cluster = cluster_ctas<Orientation, kKernel>(arguments.of_rank[0].problem, ctas_per_rank, num_ranks);
  VirtualRanksArguments complete = arguments;
  for (int r = 0; r < num_ranks; ++r) {
    MoeArguments& one = complete.of_rank[r];
    one.constants = launch_constants<Orientation, VirtualRanks>(one, ctas_per_rank, cluster);
    one.peers.late_ctas = std::min(round_up(one.peers.late_ctas, cluster), ctas_per_rank - cluster);  // both of a pair
  }
  return ClusterLaunch(dim3(ctas_per_rank, num_ranks), cluster, stream).run(kKernel, complete);
}

}  // namespace megamoe
