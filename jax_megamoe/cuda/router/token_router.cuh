// One token's selection, by the threads of a CTA. Nothing here is of nvcc alone: tests run it on a CPU, with threads for
// lanes (tests/native/route_test.cc).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "router/route.h"

namespace megamoe {

namespace routing {

constexpr unsigned kAll = ~0u;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
static_assert(8 * kThreads >= kRouterMaxExperts);
// As in routing.py: from here down sqrt(log(1 + exp(x))) is exp(x / 2) in FP32, and from there down it is subnormal.
constexpr float kSmallLogit = -16.0f;
constexpr float kSubnormalLogit = -174.67309f;

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, distance));
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAll, value, distance);
  return value;
}

// NaN comes first of all, then what is infinite itself.
__device__ __forceinline__ float nan_as_infinity(float value) {
  return isnan(value) ? INFINITY : (value > FLT_MAX ? FLT_MAX : value);
}

// Whole numbers in the order of floats, above 0; equal for both zeros.
__device__ __forceinline__ uint32_t order_of(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float sqrt_softplus(float x) {
  if (x < kSmallLogit) return expf(0.5f * x);
  return sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
}

// What is added to a token's logits so that their sqrt_softplus does not underflow: the order of experts, and quotients
// of scores, stay as they were.
__device__ __forceinline__ float rise_of_small(float largest) {
  return -fmaxf(fminf(largest - kSmallLogit, 0.0f), -FLT_MAX);
}

// The highest of what the warp's lanes have, and of equal ones the lowest number; that one is gone the next time.
struct Best {
  uint32_t order, number;
};
template <int kValues>
__device__ __forceinline__ Best take_best(uint32_t (&orders)[kValues], const uint32_t (&numbers)[kValues]) {
  uint32_t order = 0, number = kAll;
#pragma unroll
  for (int j = 0; j < kValues; ++j) order = max(order, orders[j]);
  order = __reduce_max_sync(kAll, order);
#pragma unroll
  for (int j = 0; j < kValues; ++j) number = orders[j] == order ? min(number, numbers[j]) : number;
  number = __reduce_min_sync(kAll, number);
#pragma unroll
  for (int j = 0; j < kValues; ++j) orders[j] = numbers[j] == number ? 0 : orders[j];
  return {order, number};
}

struct SharedRoute {
  float scores[kRouterMaxExperts];
  float values[kRouterMaxExperts];  // what is selected by
  uint32_t group_order[kRouterMaxExperts];
  bool is_kept[kRouterMaxExperts];
  Best candidates[kWarps][kRouterMaxTopK];  // each warp's best ones
  float of_warp[kWarps];
};

// One CTA for each token, whose thread t has experts t, t + kThreads, ...: kValues of them. Small loops rather than
// unrolled code: a token's time is mostly that of fetching instructions.
template <int kValues>
class TokenRouter {
 public:
  __device__ TokenRouter(const RouteArguments& args, SharedRoute& shared)
      : args_(args),
        shared_(shared),
        logits_(args.logits + static_cast<size_t>(blockIdx.x) * args.num_experts),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32) {}

  __device__ __forceinline__ void run() {
    score();
    if (args_.top_groups < args_.num_groups) keep_best_groups();
    select();
    if (warp_ == 0) weigh();
  }

 private:
  template <typename Body>
  __device__ __forceinline__ void for_experts(const Body& body) const {
#pragma unroll 1
    for (int e = threadIdx.x; e < args_.num_experts; e += kThreads) body(e);
  }

  // The largest number that any thread has, or the sum, by all threads.
  template <typename Reduce>
  __device__ __forceinline__ float of_all(float value, const Reduce& reduce) const {
    __syncthreads();  // the time before is over
    value = reduce(value);
    if (lane_ == 0) shared_.of_warp[warp_] = value;
    __syncthreads();
    return reduce(shared_.of_warp[lane_ % kWarps]);
  }

  // Scores, and what is selected by.
  __device__ __forceinline__ void score() {
    const bool in_groups = args_.top_groups < args_.num_groups;
    const bool is_softmax = args_.scoring == Scoring::kSoftmax;
    const bool is_root = args_.scoring == Scoring::kSqrtSoftplus;
    float largest = 0.0f;
    if (is_softmax || (is_root && in_groups && args_.bias == nullptr)) {
      largest = -INFINITY;
      for_experts([&](int e) { largest = fmaxf(largest, logits_[e]); });  // without NaN
      largest = of_all(largest, warp_max);
    }
    float sum = 0.0f;
    for_experts([&](int e) {
      const float logit = logits_[e];
      float value;
      if (is_softmax) {
        value = expf(logit - largest);  // NaN where all are -inf
        sum += value;
      } else {
        value = is_root ? sqrt_softplus(logit) : sigmoid(logit);
      }
      shared_.scores[e] = value;
    });
    if (is_softmax) {
      // Each of the warps' sums is in kWarps lanes.
      sum = of_all(sum, [&](float value) { return warp_sum(value); }) / (32 / kWarps);
    }
    for_experts([&](int e) {
      float value = shared_.scores[e];
      if (is_softmax) shared_.scores[e] = value = value / sum;
      if (args_.bias != nullptr) {
        value += __ldg(args_.bias + e);
      } else if (is_root) {
        const float logit = logits_[e];
        if (in_groups) {
          value = sqrt_softplus(logit + rise_of_small(largest));
        } else if (logit < kSubnormalLogit) {
          value = logit;
        }
      }
      shared_.values[e] = nan_as_infinity(value);
    });
    __syncthreads();
  }

  // What is in no selected group comes behind everything else.
  __device__ __forceinline__ void keep_best_groups() {
    const int size = static_cast<int>(args_.group_size.value());
#pragma unroll 1
    for (int g = warp_; g < args_.num_groups; g += kWarps) {
      float first = -INFINITY, second = -INFINITY;
#pragma unroll 1
      for (int i = lane_; i < size; i += 32) {
        const float value = shared_.values[g * size + i];
        second = fmaxf(second, fminf(first, value));
        first = fmaxf(first, value);
      }
#pragma unroll 1
      for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(kAll, first, distance);
        second = fmaxf(fminf(first, other), fmaxf(second, __shfl_xor_sync(kAll, second, distance)));
        first = fmaxf(first, other);
      }
      if (lane_ == 0) {
        shared_.group_order[g] = order_of(nan_as_infinity(args_.sums_two && size > 1 ? first + second : first));
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int g = threadIdx.x; g < args_.num_groups; g += kThreads) {
      int before = 0;
#pragma unroll 1
      for (int other = 0; other < args_.num_groups; ++other) {
        const uint32_t order = shared_.group_order[other], own = shared_.group_order[g];
        before += order > own || (order == own && other < g);
      }
      shared_.is_kept[g] = before < args_.top_groups;
    }
    __syncthreads();
    for_experts([&](int e) {
      const float value = shared_.values[e];
      shared_.values[e] = shared_.is_kept[args_.group_size.divide(e)] ? fmaxf(value, -FLT_MAX) : -INFINITY;
    });
  }

  // Each warp finds the best of its own experts, and the first one the best of these.
  __device__ __forceinline__ void select() {
    uint32_t orders[kValues], numbers[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      numbers[j] = j * kThreads + threadIdx.x;
      orders[j] = static_cast<int>(numbers[j]) < args_.num_experts ? order_of(shared_.values[numbers[j]]) : 0;
    }
#pragma unroll 1
    for (int slot = 0; slot < args_.top_k; ++slot) {
      const Best best = take_best(orders, numbers);
      if (lane_ == 0) shared_.candidates[warp_][slot] = best;
    }
    __syncthreads();
    if (warp_ != 0) return;
    uint32_t candidate_orders[kWarps], candidate_numbers[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const Best candidate = lane_ < args_.top_k ? shared_.candidates[w][lane_] : Best{0, kAll};
      candidate_orders[w] = candidate.order;
      candidate_numbers[w] = candidate.order == 0 ? kAll : candidate.number;
    }
#pragma unroll 1
    for (int slot = 0; slot < args_.top_k; ++slot) {
      const Best best = take_best(candidate_orders, candidate_numbers);
      if (lane_ == slot) chosen_ = static_cast<int>(best.number);
    }
  }

  // The first warp: lane i has slot i.
  __device__ __forceinline__ void weigh() {
    const bool has_slot = lane_ < args_.top_k;
    float weight = has_slot ? shared_.scores[chosen_] : 0.0f;
    if (args_.renormalize) {
      if (args_.scoring == Scoring::kSqrtSoftplus) {
        const float logit = has_slot ? logits_[chosen_] : -INFINITY;
        const float rise = rise_of_small(warp_max(logit));
        weight = has_slot ? sqrt_softplus(logit + rise) : 0.0f;
      }
      const float total = warp_sum(weight);
      weight = weight / (total == 0.0f ? 1.0f : total);
    }
    if (!has_slot) return;
    const size_t at = static_cast<size_t>(blockIdx.x) * args_.top_k + lane_;
    args_.ids[at] = chosen_;
    args_.weights[at] = weight;
  }

  const RouteArguments& args_;
  SharedRoute& shared_;
  const float* const logits_;
  const int lane_, warp_;
  int chosen_ = 0;
};

}  // namespace routing

}  // namespace megamoe
