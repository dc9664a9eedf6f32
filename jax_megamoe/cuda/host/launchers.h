// One compiled kernel per orientation and kind of group; each instantiation file defines these for its own.
#pragma once

#include <cuda_runtime_api.h>

#include "host/choices.h"
#include "kernels/arguments.h"
#include "layout/weight_format.h"

namespace megamoe {

template <typename Format>
struct SwapAb;
template <typename Format>
struct SwapAbHalves;
template <typename Format>
struct Normal;
struct OneRank;
struct PeerRanks;

// Names an orientation, which only instantiation files know whole.
template <typename T>
struct OrientationTag {
  using type = T;
};

// Calls `visit` with the orientation of a launch.
template <typename Format, typename Visit>
cudaError_t with_orientation(const LaunchChoice& choice, const Visit& visit) {
  if (!choice.swap_operands) return visit(OrientationTag<Normal<Format>>());
  if constexpr (Format::kDecodes) {
    if (choice.ctas_per_sm == 2) return visit(OrientationTag<SwapAbHalves<Format>>());
  }
  return visit(OrientationTag<SwapAb<Format>>());
}

// Calls it with each that the format has, until one returns an error.
template <typename Format, typename Visit>
cudaError_t for_each_orientation(const Visit& visit) {
  cudaError_t error = visit(OrientationTag<SwapAb<Format>>());
  if constexpr (Format::kDecodes) {
    if (error == cudaSuccess) error = visit(OrientationTag<SwapAbHalves<Format>>());
  }
  return error == cudaSuccess ? visit(OrientationTag<Normal<Format>>()) : error;
}

template <typename Orientation, typename Group>
struct Launcher {
  static cudaError_t prepare();
  // Of two CTAs, that the current device runs at the same time.
  static int num_clusters();
  static cudaError_t launch(const MoeArguments& arguments, const LaunchChoice& choice, int num_ctas,
                            cudaStream_t stream);
};

// Several ranks on one GPU.
template <typename Orientation>
struct VirtualRanksLauncher {
  static cudaError_t prepare();
  static int num_clusters();
  static cudaError_t launch(const VirtualRanksArguments& arguments, const LaunchChoice& choice, int num_ranks,
                            int ctas_per_rank, cudaStream_t stream);
};

}  // namespace megamoe
