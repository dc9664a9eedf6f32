#include "ffi/call_site.h"

#include <string>

#include "common/device_scope.h"
#include "ffi/errors.h"
#include "host/counter_arena.h"

namespace megamoe {

CallSite::~CallSite() {
  for (const auto& [ordinal, state] : devices_) {
    CounterArena::of_device(state.device).give_back(state.control, state.control_bytes);
  }
}

ffi::Error CallSite::initialize(int ordinal, int device, const Problem& problem, cudaError_t (*prepare)(WeightFormat)) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (devices_.count(ordinal) != 0) return ffi::Error::Success();
  const DeviceScope scope(device);
  if (scope.status() != cudaSuccess) return moe_cuda_failure("choosing the device", scope.status());
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) {
    return moe_failure("the device has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
                       "; the fused kernel needs 9.0 (Hopper): pass implementation=\"reference\".");
  }
  Device state;
  state.device = device;
  cudaError_t error = cudaDeviceGetAttribute(&state.num_ctas, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return moe_cuda_failure("reading the number of SMs", error);
  error = prepare(problem.format);
  if (error != cudaSuccess) return moe_cuda_failure("loading the kernels", error);
  state.control_bytes = Control::bytes(problem);
  state.counter_words = CounterSet::words(problem);
  void* control = nullptr;
  error = CounterArena::of_device(device).take(state.control_bytes, &control);
  if (error != cudaSuccess) return moe_cuda_failure("allocating the counters", error);
  state.control = static_cast<Control*>(control);
  devices_[ordinal] = state;
  return ffi::Error::Success();
}

const CallSite::Device* CallSite::find(int ordinal) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = devices_.find(ordinal);
  return found == devices_.end() ? nullptr : &found->second;
}

}  // namespace megamoe
