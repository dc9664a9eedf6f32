// Work on one of the process's devices, whatever its threads do meanwhile.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace megamoe {

// Makes a device current and lets this thread allocate while another one captures a graph; puts back what was.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    cudaGetDevice(&before_);
    status_ = cudaSetDevice(device);
    cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  ~DeviceScope() {
    cudaThreadExchangeStreamCaptureMode(&mode_);
    cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  cudaError_t status_ = cudaSuccess;
};

inline std::string cuda_failure(const std::string& what, cudaError_t error) {
  // The error is reported here; the next caller who asks for the last one would take it for its own.
  cudaGetLastError();
  return what + " failed: " + cudaGetErrorString(error);
}

}  // namespace megamoe
