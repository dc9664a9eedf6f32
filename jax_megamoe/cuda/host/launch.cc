#include "host/launch.h"

#include "host/launchers.h"

namespace megamoe {

namespace {

template <bool kSwap>
cudaError_t prepare(GroupKind kind) {
  switch (kind) {
    case GroupKind::kOneRank:
      return Launcher<kSwap, OneRank>::prepare();
    case GroupKind::kPeers:
      return Launcher<kSwap, PeerRanks>::prepare();
    default:
      return VirtualRanksLauncher<kSwap>::prepare();
  }
}

template <typename Group>
cudaError_t launch(const MoeArguments& arguments, int num_ctas, cudaStream_t stream) {
  return arguments.problem.swap_operands() ? Launcher<true, Group>::launch(arguments, num_ctas, stream)
                                           : Launcher<false, Group>::launch(arguments, num_ctas, stream);
}

}  // namespace

cudaError_t prepare_kernels(GroupKind kind) {
  const cudaError_t error = prepare<true>(kind);
  return error != cudaSuccess ? error : prepare<false>(kind);
}

cudaError_t launch_moe(const MoeArguments& arguments, int num_ctas, cudaStream_t stream) {
  return launch<OneRank>(arguments, num_ctas, stream);
}

cudaError_t launch_moe_peers(const MoeArguments& arguments, int num_ctas, cudaStream_t stream) {
  return launch<PeerRanks>(arguments, num_ctas, stream);
}

cudaError_t launch_virtual_ranks(const VirtualRanksArguments& arguments, int present, int ctas_per_rank,
                                 cudaStream_t stream) {
  return arguments.of_rank[0].problem.swap_operands()
             ? VirtualRanksLauncher<true>::launch(arguments, present, ctas_per_rank, stream)
             : VirtualRanksLauncher<false>::launch(arguments, present, ctas_per_rank, stream);
}

}  // namespace megamoe
