#include "host/launch.h"

#include <algorithm>

#include "host/choices.h"
#include "host/device.h"
#include "host/launchers.h"
#include "host/with_format.h"

namespace megamoe {

namespace {

template <typename Format, typename Group>
cudaError_t prepare() {
  const cudaError_t error = for_each_orientation<Format>(
      [](auto orientation) { return Launcher<typename decltype(orientation)::type, Group>::prepare(); });
  // Asked here, so that no launch is the first to ask.
  if (error == cudaSuccess) Launcher<Normal<Format>, Group>::num_clusters();
  return error;
}

template <typename Format, typename Group>
cudaError_t launch_slice(const MoeArguments& slice, const LaunchChoice& choice, int num_ctas, cudaStream_t stream) {
  return with_orientation<Format>(choice, [&](auto orientation) {
    return Launcher<typename decltype(orientation)::type, Group>::launch(slice, choice, num_ctas, stream);
  });
}

// One launch for each slice of the tokens.
template <typename Format, typename Group>
cudaError_t launch(const MoeArguments& call, bool has_peers, int most, int num_ctas, cudaStream_t stream) {
  Device device = current_device(num_ctas);
  device.num_clusters = Launcher<Normal<Format>, Group>::num_clusters();
  const int tokens = call.problem.num_tokens;
  // All slices take the side of the first one, for which the workspace was made; a call of one slice the rule's.
  Problem part = call.problem;
  part.num_tokens = std::min(tokens, most);
  const OperandOrder side = part.swap_operands() ? OperandOrder::kSwapped : OperandOrder::kNormal;
  const OperandOrder order = tokens <= most ? call.problem.order : side;
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
    const LaunchChoice choice = choose(slice.problem, part, device, has_peers);
    const int ctas = ctas_of_launch(choice, device);
    if (ctas == 0) return cudaErrorNotSupported;
    const cudaError_t error = launch_slice<Format, Group>(slice, choice, ctas, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t prepare_moe(WeightFormat format) {
  return with_format(format, [](auto f) { return prepare<decltype(f), OneRank>(); });
}

cudaError_t prepare_moe_peers(WeightFormat format) {
  return with_format(format, [](auto f) { return prepare<decltype(f), PeerRanks>(); });
}

cudaError_t launch_moe(const MoeArguments& arguments, int tokens_per_launch, int num_ctas, cudaStream_t stream) {
  return with_format(arguments.problem.format, [&](auto f) {
    return launch<decltype(f), OneRank>(arguments, /*has_peers=*/false, tokens_per_launch, num_ctas, stream);
  });
}

cudaError_t launch_moe_peers(const MoeArguments& arguments, int tokens_per_launch, int num_ctas, cudaStream_t stream) {
  return with_format(arguments.problem.format, [&](auto f) {
    return launch<decltype(f), PeerRanks>(arguments, /*has_peers=*/true, tokens_per_launch, num_ctas, stream);
  });
}

}  // namespace megamoe
