// Errors of the handlers of the fused layer, as Python's user reads them.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "common/device_scope.h"
#include "xla/ffi/api/ffi.h"

namespace megamoe {

inline xla::ffi::Error moe_failure(const std::string& what) {
  return xla::ffi::Error::InvalidArgument("jax_megamoe.moe: " + what);
}

// What to do about an error of CUDA's, where that is known.
inline std::string remedy(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "; leave room for it beside JAX's own pool with a smaller XLA_PYTHON_CLIENT_MEM_FRACTION";
    case cudaErrorInsufficientDriver:
      return "; update the driver, or build the package with an older CUDA toolkit (docs/building.md)";
    default:
      return "";
  }
}

inline xla::ffi::Error moe_cuda_failure(const char* what, cudaError_t error) {
  return xla::ffi::Error::Internal("jax_megamoe.moe: " + cuda_failure(what, error) + remedy(error) + ".");
}

}  // namespace megamoe
