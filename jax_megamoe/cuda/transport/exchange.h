// Exchanges small records between the ranks of a communicator, on a stream of its own, outside the hot path.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <vector>

#include "transport/nccl_api.h"

namespace megamoe::transport {

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

std::string cuda_failure(const char* what, cudaError_t error);

// The CUDA device that a communicator works on.
std::string device_of(Communicator communicator, int* device);

// Every rank of the communicator makes the same calls in the same order; each waits for all others, for so long.
class Exchange {
 public:
  ~Exchange();

  std::string open(Communicator communicator, int device, double timeout_seconds);
  int rank() const { return rank_; }
  int num_ranks() const { return num_ranks_; }
  int device() const { return device_; }
  Communicator communicator() const { return communicator_; }
  const NcclApi& nccl() const { return *nccl_; }
  cudaStream_t stream() const { return stream_; }
  double timeout_seconds() const { return timeout_seconds_; }
  bool is_stuck() const { return is_stuck_; }  // a rank did not come: the stream never gets on

  // all->at(r) is what rank r passed as `mine`. `phase` names the step in an error.
  template <typename Record>
  std::string gather(const char* phase, const Record& mine, std::vector<Record>* all) {
    static_assert(sizeof(Record) <= kMaxRecordBytes, "the staging memory is too small for this record");
    all->resize(num_ranks_);
    return gather_bytes(phase, &mine, all->data(), sizeof(Record));
  }

  // The failures of all ranks in one text, the same on each, or nothing: all go on, or none does.
  std::string agree(const char* phase, const std::string& own_failure);

 private:
  static constexpr size_t kMaxRecordBytes = 256;

  std::string gather_bytes(const char* phase, const void* mine, void* all, size_t bytes);

  const NcclApi* nccl_ = nullptr;
  Communicator communicator_ = nullptr;
  int device_ = 0, rank_ = 0, num_ranks_ = 0;
  double timeout_seconds_ = 0;
  cudaStream_t stream_ = nullptr;
  char* staging_ = nullptr;
  bool is_stuck_ = false;
};

}  // namespace megamoe::transport
