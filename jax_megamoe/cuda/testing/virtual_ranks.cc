#include "testing/virtual_ranks.h"

#include "host/choices.h"
#include "host/device.h"
#include "host/launchers.h"

namespace megamoe {

cudaError_t prepare_virtual_ranks() {
  cudaError_t error = VirtualRanksLauncher<SwapAb<Fp8Block>>::prepare();
  if (error == cudaSuccess) error = VirtualRanksLauncher<Normal<Fp8Block>>::prepare();
  if (error == cudaSuccess) VirtualRanksLauncher<Normal<Fp8Block>>::num_clusters();  // as in host/launch.cc
  return error;
}

cudaError_t launch_virtual_ranks(const VirtualRanksArguments& arguments, int present, int ctas_per_rank,
                                 cudaStream_t stream) {
  Device device = current_device(ctas_per_rank);
  device.num_clusters = VirtualRanksLauncher<Normal<Fp8Block>>::num_clusters() / present;
  const LaunchChoice choice = choose(arguments.of_rank[0].problem, device, /*has_peers=*/true);
  return choice.swap_operands ? VirtualRanksLauncher<SwapAb<Fp8Block>>::launch(arguments, choice, present, ctas_per_rank, stream)
                              : VirtualRanksLauncher<Normal<Fp8Block>>::launch(arguments, choice, present, ctas_per_rank, stream);
}

}  // namespace megamoe
