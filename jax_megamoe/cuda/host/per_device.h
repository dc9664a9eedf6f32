// A number that is asked of the driver once per device: launches are too frequent to ask each time.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

namespace megamoe {

class PerDevice {
 public:
  // Of the current device: what `ask(device)` returned the first time, a positive number; `otherwise` without such a device.
  template <typename Ask>
  int get(const Ask& ask, int otherwise) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kMaxDevices) return otherwise;
    int number = known_[device].load(std::memory_order_relaxed);
    if (number == 0) known_[device].store(number = ask(device), std::memory_order_relaxed);
    return number;
  }

 private:
  static constexpr int kMaxDevices = 64;
  std::array<std::atomic<int>, kMaxDevices> known_{};
};

}  // namespace megamoe
