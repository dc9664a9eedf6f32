#include "router/route.h"

#include <cfloat>
#include <cmath>

namespace megamoe {

namespace {

constexpr unsigned kAll = ~0u;
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

// One warp for each token. Lane l has experts l, l + 32, ...: kValues of them.
template <int kValues>
class TokenRouter {
 public:
  __device__ TokenRouter(const RouteArguments& args, int token, float* scores)
      : args_(args), token_(token), lane_(threadIdx.x % 32), scores_(scores) {}

  __device__ __forceinline__ void run() {
    load();
    score();
    if (args_.top_groups < args_.num_groups) keep_best_groups();
    select();
    weigh();
  }

 private:
  __device__ __forceinline__ int expert(int j) const { return 32 * j + lane_; }
  __device__ __forceinline__ bool exists(int j) const { return expert(j) < args_.num_experts; }

  __device__ __forceinline__ void load() {
    const float* row = args_.logits + static_cast<size_t>(token_) * args_.num_experts;
#pragma unroll
    for (int j = 0; j < kValues; ++j) logits_[j] = exists(j) ? row[expert(j)] : -INFINITY;
  }

  // Sets what is selected by, and leaves the scores in shared memory.
  __device__ __forceinline__ void score() {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kValues; ++j) largest = fmaxf(largest, logits_[j]);  // without NaN
    largest = warp_max(largest);
    const bool in_groups = args_.top_groups < args_.num_groups;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      float value;
      if (args_.scoring == Scoring::kSoftmax) {
        // An existing expert's -inf is no zero where all are: -inf - -inf is NaN.
        value = exists(j) ? expf(logits_[j] - largest) : 0.0f;
        sum += value;
      } else {
        value = args_.scoring == Scoring::kSigmoid ? sigmoid(logits_[j]) : sqrt_softplus(logits_[j]);
      }
      values_[j] = value;
    }
    if (args_.scoring == Scoring::kSoftmax) sum = warp_sum(sum);
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (args_.scoring == Scoring::kSoftmax) values_[j] = values_[j] / sum;
      if (exists(j)) scores_[expert(j)] = values_[j];
      if (args_.bias != nullptr) {
        if (exists(j)) values_[j] += __ldg(args_.bias + expert(j));
      } else if (args_.scoring == Scoring::kSqrtSoftplus) {
        if (in_groups) {
          values_[j] = sqrt_softplus(logits_[j] + rise_of_small(largest));
        } else if (logits_[j] < kSubnormalLogit) {
          values_[j] = logits_[j];
        }
      }
      values_[j] = nan_as_infinity(values_[j]);
    }
    __syncwarp();
  }

  // What is in no selected group comes behind everything else.
  __device__ __forceinline__ void keep_best_groups() {
    int group[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) group[j] = exists(j) ? static_cast<int>(args_.group_size.divide(expert(j))) : -1;
    // Lane g, g + 32, ... keeps the order of group g; there are at most so many groups as experts.
    uint32_t orders[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) orders[j] = 0;
#pragma unroll 1
    for (int g = 0; g < args_.num_groups; ++g) {
      float first = -INFINITY, second = -INFINITY;
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const float value = group[j] == g ? values_[j] : -INFINITY;
        second = fmaxf(second, fminf(first, value));
        first = fmaxf(first, value);
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(kAll, first, distance);
        second = fmaxf(fminf(first, other), fmaxf(second, __shfl_xor_sync(kAll, second, distance)));
        first = fmaxf(first, other);
      }
      const uint32_t order =
          order_of(nan_as_infinity(args_.sums_two && args_.group_size.value() > 1 ? first + second : first));
#pragma unroll
      for (int j = 0; j < kValues; ++j) orders[j] = expert(j) == g ? order : orders[j];
    }
    bool kept[kValues] = {};
#pragma unroll 1
    for (int i = 0; i < args_.top_groups; ++i) {
      const int best = take_best(orders);
#pragma unroll
      for (int j = 0; j < kValues; ++j) kept[j] |= group[j] == best;
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      values_[j] = kept[j] ? (values_[j] < -FLT_MAX ? -FLT_MAX : values_[j]) : -INFINITY;
    }
  }

  // The number whose order is highest, of equal ones the lowest; it is not there for the next time.
  __device__ __forceinline__ int take_best(uint32_t (&orders)[kValues]) const {
    uint32_t best = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) best = max(best, orders[j]);
    best = __reduce_max_sync(kAll, best);
    uint32_t number = kAll;
#pragma unroll
    for (int j = kValues - 1; j >= 0; --j) number = orders[j] == best ? expert(j) : number;
    number = __reduce_min_sync(kAll, number);
#pragma unroll
    for (int j = 0; j < kValues; ++j) orders[j] = expert(j) == static_cast<int>(number) ? 0 : orders[j];
    return static_cast<int>(number);
  }

  __device__ __forceinline__ void select() {
    uint32_t orders[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) orders[j] = exists(j) ? order_of(values_[j]) : 0;
#pragma unroll 1
    for (int slot = 0; slot < args_.top_k; ++slot) {
      const int best = take_best(orders);
      if (lane_ == slot) chosen_ = best;
    }
  }

  // Lane i has slot i.
  __device__ __forceinline__ void weigh() {
    const bool has_slot = lane_ < args_.top_k;
    float weight = has_slot ? scores_[chosen_] : 0.0f;
    if (args_.renormalize) {
      if (args_.scoring == Scoring::kSqrtSoftplus) {
        const float* row = args_.logits + static_cast<size_t>(token_) * args_.num_experts;
        const float logit = has_slot ? row[chosen_] : -INFINITY;
        const float rise = rise_of_small(warp_max(logit));
        weight = has_slot ? sqrt_softplus(logit + rise) : 0.0f;
      }
      const float total = warp_sum(weight);
      weight = weight / (total == 0.0f ? 1.0f : total);
    }
    if (!has_slot) return;
    const size_t at = static_cast<size_t>(token_) * args_.top_k + lane_;
    args_.ids[at] = chosen_;
    args_.weights[at] = weight;
  }

  const RouteArguments& args_;
  const int token_, lane_;
  float* const scores_;  // [E] in shared memory
  float logits_[kValues], values_[kValues];
  int chosen_ = 0;
};

// A token's warp is alone in its CTA: there are rarely more tokens than the GPU has room for, and then it matters least.
template <int kValues>
__global__ void __launch_bounds__(32) route(const __grid_constant__ RouteArguments args) {
  __shared__ float scores[32 * kValues];
  TokenRouter<kValues>(args, static_cast<int>(blockIdx.x), scores).run();
}

}  // namespace

cudaError_t launch_route(const RouteArguments& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return cudaSuccess;
  const auto kernel = args.num_experts <= 128   ? route<4>
                      : args.num_experts <= 256 ? route<8>
                      : args.num_experts <= 512 ? route<16>
                                                : route<32>;
  kernel<<<args.num_tokens, 32, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace megamoe
