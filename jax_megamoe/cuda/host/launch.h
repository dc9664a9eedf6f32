// Host side of the fused kernel: how it is prepared and launched. No XLA types here.
#pragma once

#include <cuda_runtime_api.h>

#include "host/limits.h"
#include "kernels/arguments.h"

namespace megamoe {

// Who has the experts: one device, the GPUs of a group, or several ranks on one GPU.
enum class GroupKind { kOneRank, kPeers, kVirtualRanks };

// Loads the kernels on the current device and raises their shared-memory limit. Outside the hot path: module loading may
// synchronise.
cudaError_t prepare_kernels(GroupKind kind);

// Enqueues a call: launches for `tokens_per_launch` tokens at a time, those of `per_launch`; capturable. `num_ctas` is at most
// the number of SMs.
cudaError_t launch_moe(const MoeArguments& arguments, int tokens_per_launch, int num_ctas, cudaStream_t stream);

// The same on each GPU of a group, whose `arguments.peers` are set.
cudaError_t launch_moe_peers(const MoeArguments& arguments, int tokens_per_launch, int num_ctas, cudaStream_t stream);

// All ranks of a group at once, on one GPU: all their CTAs have to fit there at a time. `present` of them; the others stay away.
cudaError_t launch_virtual_ranks(const VirtualRanksArguments& arguments, int present, int ctas_per_rank,
                                 cudaStream_t stream);

}  // namespace megamoe
