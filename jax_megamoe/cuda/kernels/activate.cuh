// The activation between the two GEMMs, in FP32.
#pragma once

#include "common/ptx/approximate.cuh"
#include "layout/activation.h"

namespace megamoe {

// x * sigmoid(alpha * gate), where `rate` is -alpha * log2(e). The denominator is at least 1: where the power is subnormal
// the sum is 1, and where it overflows the quotient is zero, so that neither needs a guard.
__device__ __forceinline__ float times_sigmoid(float x, float gate, float rate) {
  return x * ptx::reciprocal(1.0f + ptx::exp2(gate * rate));
}

constexpr float kLog2E = 1.4426950408889634f;

// `kIsSilu`: alpha is 1 and there is no offset, as in most models.
template <bool kIsSilu>
class SwiGlu {
 public:
  __device__ explicit SwiGlu(const Activation& a) : a_(a) {}
  __device__ __forceinline__ float operator()(float gate, float up) const {
    gate = ptx::min(gate, a_.clamp);
    up = ptx::max(ptx::min(up, a_.clamp), -a_.clamp);
    if constexpr (kIsSilu) return times_sigmoid(gate, gate, -kLog2E) * up;
    return times_sigmoid(gate, gate, -kLog2E * a_.alpha) * (up + a_.up_offset);
  }

 private:
  const Activation& a_;
};

class SiTu {
 public:
  __device__ explicit SiTu(const Activation& a) : a_(a) {}
  __device__ __forceinline__ float operator()(float gate, float up) const {
    return times_sigmoid(bounded(gate, a_.beta), gate, -kLog2E) * bounded(up, a_.linear_beta);
  }

 private:
  __device__ __forceinline__ static float bounded(float x, float bound) {
    return bound * ptx::tanh(__fdividef(x, bound));
  }
  const Activation& a_;
};

// Calls `body` with the function of gate and up: around a loop over many values, since inside it the question which one
// it is would keep apart what the compiler overlaps.
template <typename Body>
__device__ __forceinline__ void with_activation(const Activation& a, const Body& body) {
  if (a.beta != 0.0f) {
    body(SiTu(a));
  } else if (a.alpha != 1.0f || a.up_offset != 0.0f) {
    body(SwiGlu<false>(a));
  } else {
    body(SwiGlu<true>(a));
  }
}

// For one value of few: copies of the loop would cost registers.
__device__ __forceinline__ float activate(float gate, float up, const Activation& a) {
  return a.beta != 0.0f ? SiTu(a)(gate, up) : SwiGlu<false>(a)(gate, up);
}

}  // namespace megamoe
