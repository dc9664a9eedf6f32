// The images that units read and write (layout/image.h).
#pragma once

#include "kernels/arguments.h"
#include "kernels/roles.h"
#include "kernels/shared_header.cuh"
#include "layout/image.h"

namespace megamoe {

// What the unit's gate/up epilogue writes and its chunk's down units read, where it is not in a ring.
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

// Whether images of tokens may be, and are, put together while units run (kernels/image_assembly.cuh).
template <typename Orientation, typename Group>
constexpr bool kMayAssembleImages = Orientation::kMayAssembleImages && Group::kHasPeers;

template <typename Orientation, typename Group>
__device__ __forceinline__ bool assembles_images(const MoeArguments& args) {
  return kMayAssembleImages<Orientation, Group> && args.constants.assembles_images;
}

// The first row of a chunk's place in a ring, of 128 rows each.
__device__ __forceinline__ int row_in_ring(const Divisor& slots, int chunk) {
  return (chunk - static_cast<int>(slots.divide(chunk) * slots.value())) * kNormalTokenTile;
}

// Such an image, of `rows` padded rows.
__device__ __forceinline__ Image assembled_image(const MoeArguments& args, int chunk, int rows, int k_blocks) {
  return {args.workspace.token_planes,
          args.workspace.token_scales,
          row_in_ring(args.constants.image_slots, chunk),
          rows,
          k_blocks * kBlockK,
          k_blocks};
}

// The first row of a chunk's activations, whose first token has row `row_base` of all chunks'.
template <typename Orientation, typename Group>
__device__ __forceinline__ int activation_row_base(const MoeArguments& args, int chunk, int row_base) {
  if (!assembles_images<Orientation, Group>(args)) return row_base;
  return row_in_ring(args.constants.activation_slots, chunk);
}

// What a gate/up unit multiplies where images are not assembled.
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
