// Everything one launch of the fused kernel reads and writes.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "layout/activation.h"
#include "layout/peer_buffer.h"
#include "layout/unit_order.h"
#include "layout/weights.h"
#include "layout/workspace.h"

namespace megamoe {

// What follows from the problem and the number of CTAs, so that the start of the kernel does not have to compute it.
struct LaunchConstants {
  CounterSet counters[2];
  int dispatch_items_per_cta;
  Divisor dispatch_blocks;  // items per token
  Divisor gate_up_units;    // per chunk
  Divisor down_units;
  int cluster_ctas;         // 1, or 2 that share weights or tokens (kernels/cluster.cuh)
  Divisor gate_up_tickets;  // per chunk: units, or two of them for a cluster
  Divisor down_tickets;
  bool activations_stay;  // in the L2 until they are used: gate/up weights of experts with one chunk leave it first
  bool gathers_rows;      // instead of images of tokens (kernels/row_gather.cuh)
  bool assembles_images;  // while units run (kernels/image_assembly.cuh)
  int stages_in_flight;   // at most, of weights
  uint8_t stages[kNormalTokenTile / 8];  // of the ring, by the largest chunk's rows / 8 - 1
  // Where images are assembled: of both rings.
  Divisor image_slots;
  Divisor activation_slots;
  Turns turns;
  bool has_lone_token;  // quantised by each CTA for itself (kernels/lone_token.cuh)
};

struct MoeArguments {
  Problem problem;
  int num_layers;  // 1 unless the weights of several layers are stacked

  const uint16_t* x;             // [T, H] bf16
  ExpertWeights weights;         // [L, E, ...], E without the shared experts
  ExpertWeights shared_weights;  // [L, S, ...], where there are any
  const int32_t* topk_ids;       // [T, k] of the group's experts; others: unused
  const float* topk_weights;     // [T, k]
  const int32_t* layer;          // scalar in device memory, clamped to [0, L)
  Activation activation;
  float routed_scaling_factor;

  void* y;        // [T, H] bf16, or f32 when `y_is_f32`
  int32_t* load;  // routes per expert, shared ones first
  bool y_is_f32;
  bool adds_to_load;  // a launch for some of the tokens, after others

  Workspace workspace;
  Control* control;
  int counter_words;          // of each of its two sets
  Peers peers;                // where there are any
  LaunchConstants constants;  // set by launch_moe
#ifdef MEGAMOE_TRACE
  uint64_t* trace;  // [CTAs][Tracer::kRoles][Tracer::kCapacity]
#endif
};

constexpr int kMaxVirtualRanks = 8;

struct VirtualRanksArguments {
  MoeArguments of_rank[kMaxVirtualRanks];
};

}  // namespace megamoe
