// The activation between the two GEMMs, as numbers. The counterpart of jax_megamoe/activations.py, where the formulas
// and their sources are.
#pragma once

#include <limits>

namespace megamoe {

struct Activation {
  float clamp = std::numeric_limits<float>::infinity();  // of SwiGLU; +inf: none
  float alpha = 1.0f;
  float up_offset = 0.0f;
  float beta = 0.0f;  // of SiTU; 0: it is SwiGLU
  float linear_beta = 0.0f;
};

}  // namespace megamoe
