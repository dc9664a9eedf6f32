#include "host/launch.h"

#include <algorithm>
#include <type_traits>

#include "host/choices.h"
#include "host/device.h"
#include "host/launchers.h"

namespace megamoe {

namespace {

template <typename Group>
cudaError_t prepare() {
  cudaError_t error = Launcher<SwapAb<Fp8Block>, Group>::prepare();
  if (error == cudaSuccess) error = Launcher<Normal<Fp8Block>, Group>::prepare();
  if constexpr (std::is_same_v<Group, OneRank>) error = Launcher<SwapAb<Mxfp4>, Group>::prepare();
  // Asked here, so that no launch is the first to ask.
  if (error == cudaSuccess) Launcher<Normal<Fp8Block>, Group>::num_clusters();
  return error;
}

// One launch for each slice of the tokens.
template <typename Group>
cudaError_t launch(const MoeArguments& call, bool has_peers, int most, int num_ctas, cudaStream_t stream) {
  Device device = current_device(num_ctas);
  device.num_clusters = Launcher<Normal<Fp8Block>, Group>::num_clusters();
  const int tokens = call.problem.num_tokens;
  // All slices take the side of the first one, for which the workspace was made.
  Problem part = call.problem;
  part.num_tokens = std::min(tokens, most);
  const OperandOrder order = part.swap_operands() ? OperandOrder::kSwapped : OperandOrder::kNormal;
  for (int first = 0; first < tokens; first += most) {
    MoeArguments slice = call;
    const size_t values = static_cast<size_t>(first) * call.problem.hidden_size;
    slice.problem.num_tokens = std::min(tokens - first, most);
    slice.problem.order = order;
    slice.x += values;
    slice.topk_ids += static_cast<size_t>(first) * call.problem.top_k;
    slice.topk_weights += static_cast<size_t>(first) * call.problem.top_k;
    slice.y = static_cast<char*>(call.y) + values * (call.y_is_f32 ? 4 : 2);
    slice.adds_to_load = first > 0;
    const LaunchChoice choice = choose(slice.problem, device, has_peers);
    if constexpr (std::is_same_v<Group, OneRank>) {
      if (slice.problem.format == WeightFormat::kMxfp4) {
        const cudaError_t error = Launcher<SwapAb<Mxfp4>, Group>::launch(slice, choice, num_ctas, stream);
        if (error != cudaSuccess) return error;
        continue;
      }
    }
    const cudaError_t error = choice.swap_operands ? Launcher<SwapAb<Fp8Block>, Group>::launch(slice, choice, num_ctas, stream)
                                                   : Launcher<Normal<Fp8Block>, Group>::launch(slice, choice, num_ctas, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t prepare_moe() { return prepare<OneRank>(); }

cudaError_t prepare_moe_peers() { return prepare<PeerRanks>(); }

cudaError_t launch_moe(const MoeArguments& arguments, int tokens_per_launch, int num_ctas, cudaStream_t stream) {
  return launch<OneRank>(arguments, /*has_peers=*/false, tokens_per_launch, num_ctas, stream);
}

cudaError_t launch_moe_peers(const MoeArguments& arguments, int tokens_per_launch, int num_ctas, cudaStream_t stream) {
  return launch<PeerRanks>(arguments, /*has_peers=*/true, tokens_per_launch, num_ctas, stream);
}

}  // namespace megamoe
