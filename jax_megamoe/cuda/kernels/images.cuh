// The images that units read and write (layout/image.h).
#pragma once

#include "kernels/arguments.h"
#include "kernels/roles.h"
#include "kernels/shared_header.cuh"
#include "layout/image.h"

namespace megamoe {

// What the unit's gate/up epilogue writes and its chunk's down units read.
template <typename Orientation>
__device__ __forceinline__ Image activation_image(const MoeArguments& args, const UnitNote& note) {
  const int columns = args.problem.intermediate_size;
  return {args.workspace.activation_planes,
          args.workspace.activation_scales,
          note.row_base,
          note.padded_rows(),
          columns,
          columns / Orientation::kActivationScaleColumns};
}

// What a gate/up unit multiplies.
template <typename Group>
__device__ __forceinline__ Image token_image(const MoeArguments& args, const UnitNote& note, int k_blocks) {
  return {Group::own(args.workspace.token_planes),
          Group::own(args.workspace.token_scales),
          note.row_base,
          note.padded_rows(),
          k_blocks * kBlockK,
          k_blocks};
}

}  // namespace megamoe
