// Buffers from cudaMalloc: mapped by peer access inside one process, by CUDA IPC between processes of one host.
#include <string>
#include <utility>
#include <vector>

#include "transport/backing.h"
#include "common/device_scope.h"

namespace megamoe::transport {

namespace {

class PeerBacking : public Backing {
 public:
  std::string allocate(const Bootstrap& bootstrap, uint64_t bytes) override {
    device_ = bootstrap.device();
    const cudaError_t error = cudaMalloc(&buffer_, bytes);
    if (error == cudaSuccess) return {};
    buffer_ = nullptr;
    cudaGetLastError();
    return no_memory("cudaMalloc", bytes, cudaGetErrorString(error));
  }

  std::string map(Bootstrap& bootstrap, const Topology& topology, std::vector<void*>* mapped) override {
    struct Offer {
      uint64_t address;
      int32_t device;
      cudaIpcMemHandle_t handle;
    };
    Offer own = {reinterpret_cast<uint64_t>(buffer_), device_, {}};
    std::string own_failure;
    if (topology.spans_processes) {
      const cudaError_t error = cudaIpcGetMemHandle(&own.handle, buffer_);
      if (error != cudaSuccess) own_failure = cuda_failure("cudaIpcGetMemHandle", error);
    }
    std::vector<Offer> offers;
    const std::string failure = bootstrap.gather("handles", own, &offers);
    if (!failure.empty()) return failure;
    mapped->assign(offers.size(), nullptr);
    for (size_t peer = 0; peer < offers.size() && own_failure.empty(); ++peer) {
      const Offer& offer = offers[peer];
      void* address = reinterpret_cast<void*>(offer.address);
      switch (topology.reach[peer]) {
        case Reach::kSelf:
          break;
        case Reach::kSameProcess:
          own_failure = enable_access(offer.device);
          uses_access_ = true;
          break;
        default:
          own_failure = map_handle(static_cast<int>(peer), offer.handle, &address);
          uses_ipc_ = true;
      }
      (*mapped)[peer] = address;
    }
    return own_failure;
  }

  void unmap() override {
    for (void* mapping : mappings_) cudaIpcCloseMemHandle(mapping);
    mappings_.clear();
  }

  void release() override {
    cudaFree(buffer_);
    buffer_ = nullptr;
  }

  const char* name() const override {
    if (uses_access_ && uses_ipc_) return "peer access and CUDA IPC";
    return uses_ipc_ ? "CUDA IPC" : uses_access_ ? "peer access" : "own memory";
  }

  bool needs_communicator() const override { return false; }

 private:
  std::string enable_access(int peer_device) {
    const std::string pair = "device " + std::to_string(device_) + " to device " + std::to_string(peer_device);
    int possible = 0;
    cudaError_t error = cudaDeviceCanAccessPeer(&possible, device_, peer_device);
    if (error != cudaSuccess) return cuda_failure("asking for peer access of " + pair, error);
    if (!possible) return "there is no peer access from " + pair;
    error = cudaDeviceEnablePeerAccess(peer_device, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();
      error = cudaSuccess;
    }
    return error == cudaSuccess ? std::string() : cuda_failure("enabling peer access of " + pair, error);
  }

  std::string map_handle(int peer, cudaIpcMemHandle_t handle, void** address) {
    const cudaError_t error = cudaIpcOpenMemHandle(address, handle, cudaIpcMemLazyEnablePeerAccess);
    if (error != cudaSuccess) {
      *address = nullptr;
      return cuda_failure("cudaIpcOpenMemHandle of rank " + std::to_string(peer) + "'s buffer", error);
    }
    mappings_.push_back(*address);
    return {};
  }

  int device_ = 0;
  void* buffer_ = nullptr;
  std::vector<void*> mappings_;
  bool uses_access_ = false, uses_ipc_ = false;
};

}  // namespace

std::string no_memory(const std::string& what, uint64_t bytes, const std::string& reason) {
  return what + " of " + std::to_string(bytes) + " bytes beside JAX's own pool failed: " + reason +
         "; leave room for it with a smaller XLA_PYTHON_CLIENT_MEM_FRACTION";
}

std::unique_ptr<Backing> make_peer_backing() { return std::make_unique<PeerBacking>(); }

}  // namespace megamoe::transport
