#include "testing/hold_sms.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "common/ptx/clock.cuh"

namespace megamoe {

namespace {

constexpr int kSharedBytes = 227 * 1024;  // all that an SM has for one CTA

__global__ void __launch_bounds__(32, 1) hold_sm(uint64_t nanoseconds, int* ctas_begun) {
  if (threadIdx.x == 0) atomicAdd_system(ctas_begun, 1);
  const uint64_t end = ptx::global_nanoseconds() + nanoseconds;
  while (ptx::global_nanoseconds() < end) __nanosleep(1000);
}

// A zeroed counter that the host sees. One of many in turn, since an earlier call's kernel may still count.
cudaError_t next_counter(int** counter) {
  constexpr unsigned kCounters = 4096;
  static std::atomic<unsigned> calls{0};
  static int* counters = nullptr;
  static const cudaError_t error =
      cudaHostAlloc(reinterpret_cast<void**>(&counters), kCounters * sizeof(int), cudaHostAllocPortable);
  if (error != cudaSuccess) return error;
  *counter = counters + calls++ % kCounters;
  **counter = 0;
  return cudaSuccess;
}

// Until so many CTAs have begun, or as long as they would have stayed: others may keep the SMs for themselves.
void await(const int* ctas_begun, int ctas, int milliseconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds);
  while (__atomic_load_n(ctas_begun, __ATOMIC_ACQUIRE) < ctas && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

}  // namespace

cudaError_t hold_sms(int ctas, int milliseconds) {
  cudaStream_t stream;
  int* ctas_begun = nullptr;
  cudaError_t error = cudaFuncSetAttribute(hold_sm, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error == cudaSuccess) error = next_counter(&ctas_begun);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return error;
  hold_sm<<<ctas, 32, kSharedBytes, stream>>>(static_cast<uint64_t>(milliseconds) * 1000 * 1000, ctas_begun);
  error = cudaGetLastError();
  cudaStreamDestroy(stream);  // goes when the kernel is over
  if (error == cudaSuccess) await(ctas_begun, ctas, milliseconds);
  return error;
}

}  // namespace megamoe
