#include "transport/exchange.h"

#include <chrono>
#include <cstring>
#include <thread>

namespace megamoe::transport {

std::string cuda_failure(const char* what, cudaError_t error) {
  // The error is reported here; the next caller who asks for the last one would take it for its own.
  cudaGetLastError();
  return std::string(what) + " failed: " + cudaGetErrorString(error);
}

std::string device_of(Communicator communicator, int* device) {
  std::string reason;
  const NcclApi* nccl = nccl_api(&reason);
  if (nccl == nullptr) return reason;
  const int result = nccl->device(communicator, device);
  return result == NcclApi::kSuccess
             ? std::string()
             : std::string("asking for the communicator's device failed: ") + nccl->error_string(result);
}

Exchange::~Exchange() {
  // A stream that waits for a rank which never came would block these for ever.
  if (is_stuck_ || stream_ == nullptr) return;
  DeviceScope scope(device_);
  cudaStreamDestroy(stream_);
  cudaFree(staging_);
}

std::string Exchange::open(Communicator communicator, int device, double timeout_seconds) {
  std::string reason;
  nccl_ = nccl_api(&reason);
  if (nccl_ == nullptr) return reason;
  communicator_ = communicator;
  device_ = device;
  timeout_seconds_ = timeout_seconds;
  int comm_device = -1;
  for (const int result : {nccl_->rank(communicator, &rank_), nccl_->num_ranks(communicator, &num_ranks_),
                           nccl_->device(communicator, &comm_device)}) {
    if (result != NcclApi::kSuccess) {
      return std::string("asking XLA's communicator for its ranks failed: ") + nccl_->error_string(result);
    }
  }
  if (comm_device != device) {
    return "XLA's communicator is on device " + std::to_string(comm_device) + ", wanted device " +
           std::to_string(device);
  }
  DeviceScope scope(device);
  cudaError_t error = scope.status();
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
  if (error == cudaSuccess) {
    error = cudaMalloc(reinterpret_cast<void**>(&staging_), (num_ranks_ + 1) * kMaxRecordBytes);
  }
  return error == cudaSuccess ? std::string() : cuda_failure("preparing the exchange between ranks", error);
}

std::string Exchange::gather_bytes(const char* phase, const void* mine, void* all, size_t bytes) {
  const std::string what = "rank " + std::to_string(rank_) + " of " + std::to_string(num_ranks_) + ", phase " + phase;
  DeviceScope scope(device_);
  char* const received = staging_ + kMaxRecordBytes;
  cudaError_t error = cudaMemcpyAsync(staging_, mine, bytes, cudaMemcpyHostToDevice, stream_);
  if (error != cudaSuccess) return cuda_failure((what + ": copying").c_str(), error);
  const int enqueued = nccl_->all_gather(staging_, received, bytes, NcclApi::kUint8, communicator_, stream_);
  const std::string failure = nccl_->settle(communicator_, enqueued, "ncclAllGather", timeout_seconds_);
  if (!failure.empty()) return what + ": " + failure;
  // Asked and not waited for: a rank that never comes has to end in an error.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_seconds_);
  while ((error = cudaStreamQuery(stream_)) == cudaErrorNotReady) {
    if (std::chrono::steady_clock::now() > deadline) {
      is_stuck_ = true;
      return what + ": the other ranks did not come within " + std::to_string(static_cast<int>(timeout_seconds_)) +
             " s; all of them have to run the same program";
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  cudaGetLastError();  // "not ready" is no error
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(all, received, bytes * num_ranks_, cudaMemcpyDeviceToHost, stream_);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream_);
  return error == cudaSuccess ? std::string() : cuda_failure(what.c_str(), error);
}

std::string Exchange::agree(const char* phase, const std::string& own_failure) {
  struct Verdict {
    char text[kMaxRecordBytes];
  };
  Verdict mine = {};
  std::strncpy(mine.text, own_failure.c_str(), sizeof(mine.text) - 1);
  std::vector<Verdict> all;
  const std::string failure = gather(phase, mine, &all);
  if (!failure.empty()) return failure;
  std::string joined;
  for (int peer = 0; peer < num_ranks_; ++peer) {
    if (all[peer].text[0] == '\0') continue;
    joined += (joined.empty() ? "rank " : "; rank ") + std::to_string(peer) + ": " + all[peer].text;
  }
  return joined;
}

}  // namespace megamoe::transport
