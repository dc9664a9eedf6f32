// Host side of the fused kernel: how it is prepared and launched. No XLA types here.
#pragma once

#include <cuda_runtime_api.h>

#include "host/problem.h"
#include "kernels/arguments.h"

namespace megamoe {

// Loads the kernels on the current device and raises their shared-memory limit. Outside the hot path: module loading may
// synchronise.
cudaError_t prepare_kernels();

// Enqueues one launch; capturable. `num_ctas` is at most the number of SMs.
cudaError_t launch_moe(const MoeArguments& arguments, int num_ctas, cudaStream_t stream);

}  // namespace megamoe
