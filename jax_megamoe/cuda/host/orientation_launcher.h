// One compiled kernel per orientation; each instantiation file defines this pair for its own.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/arguments.h"

namespace megamoe {

template <bool kSwap>
struct OrientationLauncher {
  static cudaError_t prepare();
  static cudaError_t launch(const MoeArguments& arguments, int num_ctas, cudaStream_t stream);
};

}  // namespace megamoe
