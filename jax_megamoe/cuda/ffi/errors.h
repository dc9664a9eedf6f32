// Errors of the handlers of the fused layer, as Python's user reads them.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace megamoe {

inline xla::ffi::Error moe_failure(const std::string& what) {
  return xla::ffi::Error::InvalidArgument("jax_megamoe.moe: " + what);
}

inline xla::ffi::Error moe_cuda_failure(const char* what, cudaError_t error) {
  return xla::ffi::Error::Internal(std::string("jax_megamoe.moe: ") + what + " failed: " + cudaGetErrorString(error) +
                                   ".");
}

}  // namespace megamoe
