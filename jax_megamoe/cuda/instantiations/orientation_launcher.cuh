#pragma once

#include "host/orientation_launcher.h"
#include "kernels/moe_sm90.cuh"

namespace megamoe {

template <bool kSwap>
cudaError_t OrientationLauncher<kSwap>::prepare() {
  return cudaFuncSetAttribute(moe_sm90<kSwap>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

template <bool kSwap>
cudaError_t OrientationLauncher<kSwap>::launch(const MoeArguments& arguments, int num_ctas, cudaStream_t stream) {
  moe_sm90<kSwap><<<num_ctas, kCtaThreads, kSharedBytes, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace megamoe
