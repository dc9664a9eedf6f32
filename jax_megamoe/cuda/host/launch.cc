#include "host/launch.h"

#include <algorithm>

#include "host/launchers.h"

namespace megamoe {

namespace {

template <typename Orientation>
cudaError_t prepare(GroupKind kind) {
  switch (kind) {
    case GroupKind::kOneRank:
      return Launcher<Orientation, OneRank>::prepare();
    case GroupKind::kPeers:
      return Launcher<Orientation, PeerRanks>::prepare();
    default:
      return VirtualRanksLauncher<Orientation>::prepare();
  }
}

template <typename Group>
cudaError_t launch_slice(const MoeArguments& arguments, bool swap, int num_ctas, cudaStream_t stream) {
  return swap ? Launcher<SwapAb, Group>::launch(arguments, num_ctas, stream)
              : Launcher<Normal, Group>::launch(arguments, num_ctas, stream);
}

template <typename Group>
cudaError_t launch(const MoeArguments& call, int most, int num_ctas, cudaStream_t stream) {
  const int tokens = call.problem.num_tokens;
  // Of all slices as of the first one, for which the workspace was made.
  Problem part = call.problem;
  part.num_tokens = std::min(tokens, most);
  const bool swap = part.swap_operands();
  for (int first = 0; first < tokens; first += most) {
    MoeArguments slice = call;
    const size_t values = static_cast<size_t>(first) * call.problem.hidden_size;
    slice.problem.num_tokens = std::min(tokens - first, most);
    slice.x += values;
    slice.topk_ids += static_cast<size_t>(first) * call.problem.top_k;
    slice.topk_weights += static_cast<size_t>(first) * call.problem.top_k;
    slice.y = static_cast<char*>(call.y) + values * (call.y_is_f32 ? 4 : 2);
    slice.adds_to_load = first > 0;
    const cudaError_t error = launch_slice<Group>(slice, swap, num_ctas, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t prepare_kernels(GroupKind kind) {
  const cudaError_t error = prepare<SwapAb>(kind);
  return error != cudaSuccess ? error : prepare<Normal>(kind);
}

cudaError_t launch_moe(const MoeArguments& arguments, int tokens_per_launch, int num_ctas, cudaStream_t stream) {
  return launch<OneRank>(arguments, tokens_per_launch, num_ctas, stream);
}

cudaError_t launch_moe_peers(const MoeArguments& arguments, int tokens_per_launch, int num_ctas, cudaStream_t stream) {
  return launch<PeerRanks>(arguments, tokens_per_launch, num_ctas, stream);
}

cudaError_t launch_virtual_ranks(const VirtualRanksArguments& arguments, int present, int ctas_per_rank,
                                 cudaStream_t stream) {
  return arguments.of_rank[0].problem.swap_operands()
             ? VirtualRanksLauncher<SwapAb>::launch(arguments, present, ctas_per_rank, stream)
             : VirtualRanksLauncher<Normal>::launch(arguments, present, ctas_per_rank, stream);
}

}  // namespace megamoe
