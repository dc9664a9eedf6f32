#include "testing/hold_sms.h"
#include "common/ptx/clock.cuh"

namespace megamoe {

namespace {

constexpr int kSharedBytes = 227 * 1024;  // all that an SM has for one CTA

__global__ void __launch_bounds__(32, 1) hold_sm(uint64_t nanoseconds) {
  const uint64_t end = ptx::global_nanoseconds() + nanoseconds;
  while (ptx::global_nanoseconds() < end) __nanosleep(1000);
}

}  // namespace

cudaError_t hold_sms(int ctas, int milliseconds) {
  cudaStream_t stream;
  cudaError_t error = cudaFuncSetAttribute(hold_sm, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return error;
  hold_sm<<<ctas, 32, kSharedBytes, stream>>>(static_cast<uint64_t>(milliseconds) * 1000 * 1000);
  error = cudaGetLastError();
  cudaStreamDestroy(stream);  // goes when the kernel is over
  return error;
}

}  // namespace megamoe
