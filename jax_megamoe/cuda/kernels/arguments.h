// Everything one launch of the fused kernel reads and writes.
#pragma once

#include <cstdint>

#include "layout/workspace.h"

namespace megamoe {

struct MoeArguments {
  Problem problem;
  int num_layers;  // 1 unless the weights of several layers are stacked

  const uint16_t* x;           // [T, H] bf16
  const uint8_t* gate_up;      // [L, E, I/64, H/128, 2 planes] e4m3
  const float* gate_up_scale;  // [L, E, I/64, H/128, 4]
  const uint8_t* down;         // [L, E, H/64, I/128, 1 plane] e4m3
  const float* down_scale;     // [L, E, H/64, ceil(I/256), 4]
  const int32_t* topk_ids;     // [T, k]; outside [0, E): unused
  const float* topk_weights;   // [T, k]
  const int32_t* layer;        // scalar in device memory, clamped to [0, L)
  float activation_clamp;      // +inf: none
  float routed_scaling_factor;

  void* y;        // [T, H] bf16, or f32 when `y_is_f32`
  int32_t* load;  // [E] (token, slot) pairs per expert
  bool y_is_f32;

  Workspace workspace;
  Control* control;
#ifdef MEGAMOE_TRACE
  uint64_t* trace;  // [CTAs][Tracer::kRoles][Tracer::kCapacity]
#endif
};

}  // namespace megamoe
