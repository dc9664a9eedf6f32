// Buffers from ncclMemAlloc, mapped by a symmetric window of NCCL.
#include <string>
#include <vector>

#include "transport/symmetric_memory.h"
#include "transport/window_table.h"

namespace megamoe::transport {

namespace {

class WindowBacking : public Backing {
 public:
  ~WindowBacking() override {
    if (buffer_ == nullptr) return;
    // XLA may have destroyed the communicator by now, and the window with it: only a set-up that failed gives back both.
    if (window_ != nullptr && !is_open_) nccl_->deregister_window(communicator_, window_);
    if (window_ == nullptr || !is_open_) nccl_->release(buffer_);
  }

  std::string open(Exchange& exchange, const Plan&, size_t bytes, std::vector<void*>* peers) override {
    nccl_ = &exchange.nccl();
    communicator_ = exchange.communicator();
    DeviceScope scope(exchange.device());
    std::string failure = exchange.agree("allocation", allocate(exchange, bytes));
    if (!failure.empty()) return failure;
    // All ranks take part in a registration, so that none may come without the others: hence the agreement before it.
    const int registered =
        nccl_->register_window(communicator_, buffer_, bytes, &window_, NcclApi::kCollectiveSymmetricWindow);
    failure = nccl_->settle(communicator_, registered, "ncclCommWindowRegister", exchange.timeout_seconds());
    if (failure.empty() && window_ == nullptr) failure = "NCCL registers no symmetric windows on this machine";
    if (failure.empty()) failure = read_peers(exchange, peers);
    failure = exchange.agree("window", failure);
    is_open_ = failure.empty();
    return failure;
  }

  const char* name() const override { return "NCCL window"; }

 private:
  std::string allocate(const Exchange& exchange, size_t bytes) {
    const int result = nccl_->allocate(&buffer_, bytes);
    if (result != NcclApi::kSuccess) {
      buffer_ = nullptr;
      return "ncclMemAlloc of " + std::to_string(bytes) + " bytes failed: " + nccl_->error_string(result);
    }
    cudaError_t error = cudaMemsetAsync(buffer_, 0, bytes, exchange.stream());
    if (error == cudaSuccess) error = cudaStreamSynchronize(exchange.stream());
    return error == cudaSuccess ? std::string() : cuda_failure("clearing the buffer", error);
  }

  std::string read_peers(const Exchange& exchange, std::vector<void*>* peers) {
    const NcclTeam team = nccl_->team_of_shared_memory(communicator_);
    const int num_ranks = exchange.num_ranks();
    if (team.num_ranks != num_ranks) {
      return "NCCL maps the memory of " + std::to_string(team.num_ranks) + " of " + std::to_string(num_ranks) +
             " ranks";
    }
    peers->assign(num_ranks, nullptr);
    if (nccl_->peer_pointer == nullptr) return read_window_table(window_, exchange.stream(), peers);
    for (int peer = 0; peer < num_ranks; ++peer) {
      const int result = nccl_->peer_pointer(window_, 0, peer, &(*peers)[peer]);
      if (result != NcclApi::kSuccess) {
        return std::string("ncclGetLsaDevicePointer failed: ") + nccl_->error_string(result);
      }
    }
    return {};
  }

  const NcclApi* nccl_ = nullptr;
  Communicator communicator_ = nullptr;
  void* buffer_ = nullptr;
  Window window_ = nullptr;
  bool is_open_ = false;
};

}  // namespace

bool has_windows(const NcclApi& nccl) {
  if (nccl.allocate == nullptr || nccl.release == nullptr || nccl.register_window == nullptr ||
      nccl.deregister_window == nullptr || nccl.team_of_shared_memory == nullptr) {
    return false;
  }
  int version = 0;
  nccl.version(&version);
  return nccl.peer_pointer != nullptr || can_read_window_table(version);
}

std::unique_ptr<Backing> make_window_backing() { return std::make_unique<WindowBacking>(); }

}  // namespace megamoe::transport
