// What the driver says of the current device. Launches are too frequent to ask each time.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>

#include "host/choices.h"

namespace megamoe {

// An answer that is asked for once per device.
template <typename T>
class PerDevice {
 public:
  // Of the current device: what `ask(device)` returned the first time.
  template <typename Ask>
  T get(const Ask& ask) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kMaxDevices) return ask(device);
    std::call_once(asked_[device], [&] { answers_[device] = ask(device); });
    return answers_[device];
  }

 private:
  static constexpr int kMaxDevices = 64;
  std::array<std::once_flag, kMaxDevices> asked_;
  std::array<T, kMaxDevices> answers_{};
};

// All of the device that a launch of `num_ctas` CTAs may use; without clusters, which the kernel has to be asked for.
Device current_device(int num_ctas);

}  // namespace megamoe
