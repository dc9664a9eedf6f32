// Buffers from cudaMalloc: mapped by peer access inside one process, by CUDA IPC between processes of one host.
#include <string>
#include <utility>
#include <vector>

#include "transport/symmetric_memory.h"

namespace megamoe::transport {

namespace {

class PeerBacking : public Backing {
 public:
  ~PeerBacking() override {
    DeviceScope scope(device_);
    for (void* mapping : mappings_) cudaIpcCloseMemHandle(mapping);
    cudaFree(buffer_);
  }

  std::string open(Exchange& exchange, const Plan& plan, size_t bytes, std::vector<void*>* peers) override {
    struct Offer {
      uint64_t address;
      int32_t device;
      cudaIpcMemHandle_t handle;
    };
    device_ = exchange.device();
    DeviceScope scope(device_);
    Offer own = {};
    own.device = device_;
    std::string failure = allocate(exchange, bytes, plan.spans_processes ? &own.handle : nullptr);
    own.address = reinterpret_cast<uint64_t>(buffer_);
    failure = exchange.agree("allocation", failure);
    if (!failure.empty()) return failure;
    std::vector<Offer> offers;
    failure = exchange.gather("handles", own, &offers);
    if (!failure.empty()) return failure;

    peers->assign(offers.size(), nullptr);
    for (size_t peer = 0; peer < offers.size() && failure.empty(); ++peer) {
      const Offer& offer = offers[peer];
      void* address = reinterpret_cast<void*>(offer.address);
      switch (plan.reach[peer]) {
        case Reach::kSelf:
          break;
        case Reach::kSameProcess:
          failure = enable_access(offer.device);
          uses_access_ = true;
          break;
        default:
          failure = map_handle(static_cast<int>(peer), offer.handle, &address);
          uses_ipc_ = true;
      }
      (*peers)[peer] = address;
    }
    return exchange.agree("mapping", failure);
  }

  const char* name() const override {
    if (uses_access_ && uses_ipc_) return "peer access and CUDA IPC";
    return uses_ipc_ ? "CUDA IPC" : uses_access_ ? "peer access" : "own memory";
  }

 private:
  std::string allocate(const Exchange& exchange, size_t bytes, cudaIpcMemHandle_t* handle) {
    cudaError_t error = cudaMalloc(&buffer_, bytes);
    if (error != cudaSuccess) {
      buffer_ = nullptr;
      return cuda_failure(("allocating " + std::to_string(bytes) + " bytes beside JAX's own pool").c_str(), error);
    }
    // Zero before any other rank learns the address.
    error = cudaMemsetAsync(buffer_, 0, bytes, exchange.stream());
    if (error == cudaSuccess) error = cudaStreamSynchronize(exchange.stream());
    if (error != cudaSuccess) return cuda_failure("clearing the buffer", error);
    if (handle == nullptr) return {};
    error = cudaIpcGetMemHandle(handle, buffer_);
    return error == cudaSuccess ? std::string() : cuda_failure("cudaIpcGetMemHandle", error);
  }

  std::string enable_access(int peer_device) {
    const std::string pair = "device " + std::to_string(device_) + " to device " + std::to_string(peer_device);
    int possible = 0;
    cudaError_t error = cudaDeviceCanAccessPeer(&possible, device_, peer_device);
    if (error != cudaSuccess) return cuda_failure(("asking for peer access of " + pair).c_str(), error);
    if (!possible) return "there is no peer access from " + pair;
    error = cudaDeviceEnablePeerAccess(peer_device, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();
      error = cudaSuccess;
    }
    return error == cudaSuccess ? std::string() : cuda_failure(("enabling peer access of " + pair).c_str(), error);
  }

  std::string map_handle(int peer, cudaIpcMemHandle_t handle, void** address) {
    const cudaError_t error = cudaIpcOpenMemHandle(address, handle, cudaIpcMemLazyEnablePeerAccess);
    if (error != cudaSuccess) {
      *address = nullptr;
      return cuda_failure(("cudaIpcOpenMemHandle of rank " + std::to_string(peer) + "'s buffer").c_str(), error);
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

std::unique_ptr<Backing> make_peer_backing() { return std::make_unique<PeerBacking>(); }

}  // namespace megamoe::transport
