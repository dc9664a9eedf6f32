#include "testing/virtual_ranks.h"

#include "host/choices.h"
#include "host/device.h"
#include "host/launchers.h"
#include "host/with_format.h"

namespace megamoe {

cudaError_t prepare_virtual_ranks(WeightFormat format) {
  return with_format(format, [](auto f) {
    using Format = decltype(f);
    const cudaError_t error = for_each_orientation<Format>(
        [](auto orientation) { return VirtualRanksLauncher<typename decltype(orientation)::type>::prepare(); });
    if (error == cudaSuccess) VirtualRanksLauncher<Normal<Format>>::num_clusters();  // as in host/launch.cc
    return error;
  });
}

cudaError_t launch_virtual_ranks(const VirtualRanksArguments& arguments, int present, int ctas_per_rank,
                                 cudaStream_t stream) {
  const Problem& problem = arguments.of_rank[0].problem;
  return with_format(problem.format, [&](auto f) {
    using Format = decltype(f);
    Device device = current_device(ctas_per_rank);
    device.num_clusters = VirtualRanksLauncher<Normal<Format>>::num_clusters() / present;
    const LaunchChoice choice = choose(problem, problem, device, /*has_peers=*/true);
    const int ctas = ctas_of_launch(choice, device);
    if (ctas == 0) return cudaErrorNotSupported;
    return with_orientation<Format>(choice, [&](auto orientation) {
      return VirtualRanksLauncher<typename decltype(orientation)::type>::launch(arguments, choice, present, ctas,
                                                                                stream);
    });
  });
}

}  // namespace megamoe
