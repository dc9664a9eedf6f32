// The weights of a layer: format, memory layout and leaves. The counterpart of ExpertWeights in jax_megamoe/weights.py;
// tests compare the two (tests/test_operands.py). Whoever adds a format gives it an entry here, its bytes in
// jax_megamoe/weight_layout.py and its loads in kernels/weight_producer.cuh; calls, handlers and ranks go by
// `weight_leaves`.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "layout/tiles.h"
#include "layout/weight_format.h"

namespace megamoe {

struct WeightFormatNames {
  WeightFormat format;
  const char* name;    // as `ExpertWeights.format` has it
  const char* layout;  // the version of the memory layout
};

constexpr WeightFormatNames kWeightFormats[] = {
    {WeightFormat::kFp8Block, "fp8_block", "sm90_v1"},
    {WeightFormat::kFp8Channel, "fp8_channel", "sm90_fp8_channel_v2"},
    {WeightFormat::kMxfp4, "mxfp4", "sm90_mxfp4_v3"},
};

// Null if no format has that name.
inline const WeightFormatNames* find_format(const std::string& name) {
  for (const WeightFormatNames& known : kWeightFormats) {
    if (name == known.name) return &known;
  }
  return nullptr;
}

enum class Element { kE4m3, kU8, kF32 };

// One array of a layer's weights, in the shape [(L,) E, *dims].
struct WeightLeaf {
  const char* name;
  Element element;
  std::array<int64_t, 3> dims;  // of an expert
  const char* text;             // the shape, for errors

  size_t expert_bytes() const {
    return static_cast<size_t>(dims[0] * dims[1] * dims[2]) * (element == Element::kF32 ? sizeof(float) : 1);
  }
};

constexpr int kNumLeaves = 4;
using WeightLeaves = std::array<WeightLeaf, kNumLeaves>;

// In the order in which a call has them.
inline WeightLeaves weight_leaves(WeightFormat format, int64_t hidden_size, int64_t intermediate_size) {
  const int64_t gate_up_tiles = intermediate_size / kGateUpTileColumns, gate_up_blocks = hidden_size / kBlockK;
  const int64_t down_tiles = hidden_size / kDownTileColumns, down_blocks = intermediate_size / kBlockK;
  WeightLeaves leaves = {{
      {"gate_up",
       Element::kE4m3,
       {gate_up_tiles, gate_up_blocks, 2 * Fp8Block::kPlaneBytes},
       "[(L,) E, I/64, H/128, 16384]"},
      {"gate_up_scale", Element::kF32, {gate_up_tiles, gate_up_blocks, kScaleVectorFloats}, "[(L,) E, I/64, H/128, 4]"},
      {"down", Element::kE4m3, {down_tiles, down_blocks, Fp8Block::kPlaneBytes}, "[(L,) E, H/64, I/128, 8192]"},
      {"down_scale",
       Element::kF32,
       {down_tiles, (down_blocks + 1) / 2, kScaleVectorFloats},
       "[(L,) E, H/64, ceil(I/256), 4]"},
  }};
  if (format == WeightFormat::kMxfp4) {
    leaves[0] = {"gate_up",
                 Element::kU8,
                 {gate_up_tiles, gate_up_blocks, 2 * Mxfp4::kPlaneBytes},
                 "[(L,) E, I/64, H/128, 8704]"};
    leaves[2] = {"down", Element::kU8, {down_tiles, down_blocks, Mxfp4::kPlaneBytes}, "[(L,) E, H/64, I/128, 4352]"};
  }
  if (format != WeightFormat::kFp8Block) {
    leaves[1] = {"gate_up_scale", Element::kF32, {gate_up_tiles, 2 * kPlaneRows, 2}, "[(L,) E, I/64, 128, 2]"};
    leaves[3] = {"down_scale", Element::kF32, {down_tiles, kPlaneRows, 2}, "[(L,) E, H/64, 64, 2]"};
  }
  return leaves;
}

// Where they are, in device memory.
struct ExpertWeights {
  const uint8_t* gate_up;      // [L, E, I/64, H/128, 2 planes]
  const float* gate_up_scale;  // [L, E, I/64, ...]
  const uint8_t* down;         // [L, E, H/64, I/128, 1 plane]
  const float* down_scale;     // [L, E, H/64, ...]

  // In the order of `weight_leaves`.
  static ExpertWeights at(const std::array<const void*, kNumLeaves>& leaves) {
    return {static_cast<const uint8_t*>(leaves[0]), static_cast<const float*>(leaves[1]),
            static_cast<const uint8_t*>(leaves[2]), static_cast<const float*>(leaves[3])};
  }
  std::array<const void*, kNumLeaves> leaves() const { return {gate_up, gate_up_scale, down, down_scale}; }

  // The same from expert `first` on.
  ExpertWeights from_expert(size_t first, WeightFormat format, int hidden_size, int intermediate_size) const {
    std::array<const void*, kNumLeaves> moved = leaves();
    const auto descriptions = weight_leaves(format, hidden_size, intermediate_size);
    for (int i = 0; i < kNumLeaves; ++i) {
      moved[i] = static_cast<const uint8_t*>(moved[i]) + first * descriptions[i].expert_bytes();
    }
    return at(moved);
  }
};

}  // namespace megamoe
