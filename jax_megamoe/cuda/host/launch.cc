#include "host/launch.h"

#include "host/orientation_launcher.h"

namespace megamoe {

cudaError_t prepare_kernels() {
  const cudaError_t error = OrientationLauncher<true>::prepare();
  return error != cudaSuccess ? error : OrientationLauncher<false>::prepare();
}

cudaError_t launch_moe(const MoeArguments& arguments, int num_ctas, cudaStream_t stream) {
  return arguments.problem.swap_operands() ? OrientationLauncher<true>::launch(arguments, num_ctas, stream)
                                           : OrientationLauncher<false>::launch(arguments, num_ctas, stream);
}

}  // namespace megamoe
