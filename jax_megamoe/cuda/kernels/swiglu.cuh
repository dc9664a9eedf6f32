// The activation between the two GEMMs, in FP32.
#pragma once

namespace megamoe {

// silu(gate) * up after clamping gate from above and up on both sides. Comparisons, not fmin: NaN has to survive.
__device__ __forceinline__ float swiglu(float gate, float up, float clamp) {
  gate = gate > clamp ? clamp : gate;
  up = up > clamp ? clamp : (up < -clamp ? -clamp : up);
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

}  // namespace megamoe
