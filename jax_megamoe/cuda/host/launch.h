// Host side of the fused kernel: how it is prepared and launched. No XLA types here.
#pragma once

#include <cuda_runtime_api.h>

#include "host/limits.h"
#include "kernels/arguments.h"

namespace megamoe {

// Load a format's kernels of one device, or of a group's, on the current device and raise their limit of shared memory.
// Outside the hot path: module loading may synchronise.
cudaError_t prepare_moe(WeightFormat format);
cudaError_t prepare_moe_peers(WeightFormat format);

// Enqueues a call: launches for `tokens_per_launch` tokens at a time, those of `per_launch`; capturable. `num_ctas` is
// at most the number of SMs.
cudaError_t launch_moe(const MoeArguments& arguments, int tokens_per_launch, int num_ctas, cudaStream_t stream);

// The same on each GPU of a group, whose `arguments.peers` are set.
cudaError_t launch_moe_peers(const MoeArguments& arguments, int tokens_per_launch, int num_ctas, cudaStream_t stream);

}  // namespace megamoe
