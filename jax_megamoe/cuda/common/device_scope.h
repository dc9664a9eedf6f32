// Work on one of the process's devices, whatever its threads do meanwhile.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

namespace megamoe {

// What a thread has current: the driver's context, which may be none. The runtime can only name a device, and calls a
// thread without a context one of device 0's: cudaSetDevice(0) would make a context there, half a gigabyte of a device
// that may be another process's.
class CurrentContext {
 public:
  CurrentContext() : is_known_(driver().get != nullptr && driver().get(&context_) == CUDA_SUCCESS) {}
  void restore() const {
    if (is_known_) driver().set(context_);
  }

 private:
  struct Driver {
    CUresult (*get)(CUcontext*) = nullptr;
    CUresult (*set)(CUcontext) = nullptr;
  };
  static const Driver& driver() {
    static const Driver driver = [] {
      Driver found;
      if (!find("cuCtxGetCurrent", &found.get) || !find("cuCtxSetCurrent", &found.set)) found = Driver();
      return found;
    }();
    return driver;
  }
  template <typename Function>
  static bool find(const char* name, Function* function) {
    constexpr unsigned kSinceCuda4 = 4000;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, reinterpret_cast<void**>(function), kSinceCuda4,
                                                               cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  }

  CUcontext context_ = nullptr;
  bool is_known_;
};

// Makes a device current and lets this thread allocate while another one captures a graph; puts back what was.
class DeviceScope {
 public:
  explicit DeviceScope(int device) : status_(cudaSetDevice(device)) { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~DeviceScope() {
    cudaThreadExchangeStreamCaptureMode(&mode_);
    before_.restore();
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaError_t status() const { return status_; }

 private:
  CurrentContext before_;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  cudaError_t status_ = cudaSuccess;
};

inline std::string cuda_failure(const std::string& what, cudaError_t error) {
  // The error is reported here; the next caller who asks for the last one would take it for its own.
  cudaGetLastError();
  return what + " failed: " + cudaGetErrorString(error);
}

}  // namespace megamoe
