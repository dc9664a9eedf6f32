// From a format known while running to one known to the compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "layout/weight_format.h"

namespace megamoe {

// What `use(Format())` returns.
template <typename Use>
cudaError_t with_format(WeightFormat format, const Use& use) {
  switch (format) {
    case WeightFormat::kFp8Block:
      return use(Fp8Block());
    case WeightFormat::kFp8Channel:
      return use(Fp8Channel());
    case WeightFormat::kMxfp4:
      return use(Mxfp4());
  }
  return cudaErrorInvalidValue;
}

}  // namespace megamoe
