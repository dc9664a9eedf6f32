// The activation between the two GEMMs, in FP32.
#pragma once

#include "layout/activation.h"

namespace megamoe {

// Comparisons, not fmin: NaN has to survive. `kIsSilu`: alpha is 1 and there is no offset, as in most models.
template <bool kIsSilu>
class SwiGlu {
 public:
  __device__ explicit SwiGlu(const Activation& a) : a_(a) {}
  __device__ __forceinline__ float operator()(float gate, float up) const {
    gate = gate > a_.clamp ? a_.clamp : gate;
    up = up > a_.clamp ? a_.clamp : (up < -a_.clamp ? -a_.clamp : up);
    if constexpr (kIsSilu) return __fdividef(gate, 1.0f + __expf(-gate)) * up;
    return __fdividef(gate, 1.0f + __expf(-a_.alpha * gate)) * (up + a_.up_offset);
  }

 private:
  const Activation& a_;
};

class SiTu {
 public:
  __device__ explicit SiTu(const Activation& a) : a_(a) {}
  __device__ __forceinline__ float operator()(float gate, float up) const {
    return __fdividef(bounded(gate, a_.beta), 1.0f + __expf(-gate)) * bounded(up, a_.linear_beta);
  }

 private:
  __device__ __forceinline__ static float bounded(float x, float bound) {
    float tanh;
    asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(__fdividef(x, bound)));
    return bound * tanh;
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
