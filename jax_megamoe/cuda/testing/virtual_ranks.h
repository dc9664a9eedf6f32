// All ranks of a group on one GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/arguments.h"

namespace megamoe {

// As `prepare_moe`.
cudaError_t prepare_virtual_ranks(WeightFormat format);

// All ranks at once: all their CTAs have to fit on the GPU at a time. `present` of them; the others stay away.
cudaError_t launch_virtual_ranks(const VirtualRanksArguments& arguments, int present, int ctas_per_rank,
                                 cudaStream_t stream);

}  // namespace megamoe
