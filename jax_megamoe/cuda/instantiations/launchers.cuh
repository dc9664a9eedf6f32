#pragma once

#include <algorithm>

#include "host/device.h"
#include "host/launchers.h"
#include "kernels/moe_sm90.cuh"

namespace megamoe {

// One launch, as clusters of `cluster` CTAs.
template <typename Orientation>
class ClusterLaunch {
 public:
  ClusterLaunch(dim3 ctas, int cluster, cudaStream_t stream) {
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config_.gridDim = ctas;
    config_.blockDim = dim3(Orientation::kThreads);
    config_.dynamicSmemBytes = Orientation::kSharedBytes;
    config_.stream = stream;
    config_.attrs = &attribute_;
    config_.numAttrs = cluster > 1 ? 1 : 0;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
  const cudaLaunchConfig_t& config() const { return config_; }

  template <typename Arguments>
  cudaError_t run(void (*kernel)(Arguments), const Arguments& arguments) const {
    if (config_.gridDim.x > kMaxSms * Orientation::kCtasPerSm) return cudaErrorInvalidConfiguration;
    const cudaError_t error = cudaLaunchKernelEx(&config_, kernel, arguments);
    cudaGetLastError();  // the caller has it now; nobody else finds it
    return error;
  }

 private:
  cudaLaunchAttribute attribute_ = {};
  cudaLaunchConfig_t config_ = {};
};

// Clusters of two CTAs of the kernel that the current device runs at the same time.
template <typename Orientation, auto kKernel>
int most_clusters() {
  static PerDevice<int> known;
  return known.get([](int) {
    const ClusterLaunch<Orientation> launch(dim3(2), 2, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kKernel, &launch.config()) == cudaSuccess) return clusters;
    cudaGetLastError();  // a device without clusters is no error of the launch that follows
    return 0;
  });
}

// What the choice and the sizes come to, in numbers that the kernel would have to work out.
template <typename Orientation, typename Group>
LaunchConstants launch_constants(const MoeArguments& arguments, const LaunchChoice& choice, int num_ctas) {
  const Problem& p = arguments.problem;
  LaunchConstants c = {};
  for (int set = 0; set < 2; ++set) c.counters[set] = CounterSet(p, arguments.control, set, arguments.counter_words);
  c.dispatch_blocks = Divisor(ceil_div(p.hidden_size, Orientation::kDispatchColumns));
  c.has_lone_token = choice.has_lone_token;
  c.dispatch_items_per_cta =
      ceil_div(p.num_tokens * static_cast<int>(c.dispatch_blocks.value()), choice.has_lone_token ? 1 : num_ctas);
  c.gate_up_units = Divisor(p.intermediate_size / (kGateUpTileColumns * Orientation::kUnitTiles));
  c.down_units = Divisor(ceil_div(p.hidden_size, kDownUnitColumns * Orientation::kUnitTiles));
  c.cluster_ctas = choice.cluster_ctas;
  c.gate_up_tickets = Divisor(ceil_div(c.gate_up_units.value(), choice.cluster_ctas));
  c.down_tickets = Divisor(ceil_div(c.down_units.value(), choice.cluster_ctas));
  c.gathers_rows = choice.gathers_rows;
  c.assembles_images = choice.assembles_images;
  c.image_slots = Divisor(p.image_slots());
  c.activation_slots = Divisor(p.activation_slots());
  c.turns = Turns(p.chunks_ahead(), kTurnChunks, c.gate_up_tickets.value(), c.down_tickets.value());
  c.activations_stay = choice.activations_stay;
  const Plan plan(p.num_local_experts, p.num_ranks, 0);
  const int most_rows = choice.has_lone_token ? kLoneTokenRows : Orientation::kTokenTile;  // of a chunk
  for (int rows = 8; rows <= most_rows; rows += 8) {
    c.stages[rows / 8 - 1] = static_cast<uint8_t>(SharedMap<Orientation>::stages_that_fit(
        plan, rows, choice.assembles_images, choice.has_lone_token ? p.hidden_size : 0));
  }
  const int wanted = ceil_div(choice.weight_bytes_in_flight, Orientation::kStageWeightBytes);
  c.stages_in_flight = std::min<int>(wanted, Orientation::kHasDecoders ? kCodeStages : c.stages[most_rows / 8 - 1]);
  return c;
}

template <typename Orientation, typename Group>
cudaError_t Launcher<Orientation, Group>::prepare() {
  return cudaFuncSetAttribute(moe_sm90<Orientation, Group>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              Orientation::kSharedBytes);
}

template <typename Orientation, typename Group>
int Launcher<Orientation, Group>::num_clusters() {
  return most_clusters<Orientation, moe_sm90<Orientation, Group>>();
}

template <typename Orientation, typename Group>
cudaError_t Launcher<Orientation, Group>::launch(const MoeArguments& arguments, const LaunchChoice& choice,
                                                 int num_ctas, cudaStream_t stream) {
  MoeArguments complete = arguments;
  complete.constants = launch_constants<Orientation, Group>(arguments, choice, num_ctas);
  return ClusterLaunch<Orientation>(dim3(num_ctas), choice.cluster_ctas, stream)
      .run(moe_sm90<Orientation, Group>, complete);
}

template <typename Orientation>
cudaError_t VirtualRanksLauncher<Orientation>::prepare() {
  return cudaFuncSetAttribute(moe_virtual_ranks<Orientation>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              Orientation::kSharedBytes);
}

template <typename Orientation>
int VirtualRanksLauncher<Orientation>::num_clusters() {
  return most_clusters<Orientation, moe_virtual_ranks<Orientation>>();
}

template <typename Orientation>
cudaError_t VirtualRanksLauncher<Orientation>::launch(const VirtualRanksArguments& arguments,
                                                      const LaunchChoice& choice, int num_ranks, int ctas_per_rank,
                                                      cudaStream_t stream) {
  const int cluster = choice.cluster_ctas;
  VirtualRanksArguments complete = arguments;
  for (int r = 0; r < num_ranks; ++r) {
    MoeArguments& one = complete.of_rank[r];
    one.constants = launch_constants<Orientation, VirtualRanks>(one, choice, ctas_per_rank);
    one.peers.late_ctas =
        std::min(round_up(one.peers.late_ctas * Orientation::kCtasPerSm, cluster), ctas_per_rank - cluster);
  }
  return ClusterLaunch<Orientation>(dim3(ctas_per_rank, num_ranks), cluster, stream)
      .run(moe_virtual_ranks<Orientation>, complete);
}

}  // namespace megamoe
