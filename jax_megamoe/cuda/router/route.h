// The router's selection: a few experts of many for each token, and their weights. The numerics, NaN among them, are
// those of jax_megamoe/routing.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/divisor.h"

namespace megamoe {

enum class Scoring : int64_t { kSoftmax, kSigmoid, kSqrtSoftplus };

constexpr int kRouterMaxExperts = 1024;
constexpr int kRouterMaxTopK = 32;

struct RouteArguments {
  const float* logits;  // [T, E]
  const float* bias;    // [E], null for none
  int32_t* ids;         // [T, k]
  float* weights;       // [T, k]
  int num_tokens, num_experts, top_k;
  Scoring scoring;
  int num_groups, top_groups;  // top_groups of num_groups are selected from
  Divisor group_size;
  bool sums_two;  // a group's score: its two best experts' sum, or its best one's
  bool renormalize;
};

cudaError_t launch_route(const RouteArguments& arguments, cudaStream_t stream);

}  // namespace megamoe
