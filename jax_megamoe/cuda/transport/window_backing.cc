// Buffers from ncclMemAlloc, mapped by a symmetric window of NCCL.
#include <string>
#include <vector>

#include "transport/backing.h"
#include "transport/window_table.h"

namespace megamoe::transport {

namespace {

class WindowBacking : public Backing {
 public:
  std::string allocate(const Bootstrap& bootstrap, uint64_t bytes) override {
    nccl_ = &bootstrap.nccl();
    communicator_ = bootstrap.communicator();
    timeout_seconds_ = bootstrap.timeout_seconds();
    bytes_ = bytes;
    const int result = nccl_->allocate(&buffer_, bytes);
    if (result == NcclApi::kSuccess) return {};
    buffer_ = nullptr;
    return no_memory("ncclMemAlloc", bytes, nccl_->error_string(result));
  }

  std::string map(Bootstrap& bootstrap, const Topology&, std::vector<void*>* mapped) override {
    // All ranks take part in a registration, so that none may come without the others: all have allocated by now.
    const int registered =
        nccl_->register_window(communicator_, buffer_, bytes_, &window_, NcclApi::kCollectiveSymmetricWindow);
    std::string failure = nccl_->settle(communicator_, registered, "ncclCommWindowRegister", timeout_seconds_);
    if (failure.empty() && window_ == nullptr) failure = "NCCL registers no symmetric windows on this machine";
    return failure.empty() ? read_peers(bootstrap, mapped) : failure;
  }

  void unmap() override {
    if (window_ == nullptr) return;
    nccl_->settle(communicator_, nccl_->deregister_window(communicator_, window_), "deregistering", timeout_seconds_);
    window_ = nullptr;
  }

  void release() override {
    if (buffer_ != nullptr) nccl_->release(buffer_);
    buffer_ = nullptr;
  }

  const char* name() const override { return "NCCL window"; }
  bool needs_communicator() const override { return true; }

 private:
  std::string read_peers(const Bootstrap& bootstrap, std::vector<void*>* mapped) {
    const NcclTeam team = nccl_->team_of_shared_memory(communicator_);
    const int num_ranks = bootstrap.num_ranks();
    if (team.num_ranks != num_ranks) {
      return "NCCL maps the memory of " + std::to_string(team.num_ranks) + " of " + std::to_string(num_ranks) +
             " ranks";
    }
    mapped->assign(num_ranks, nullptr);
    if (nccl_->peer_pointer == nullptr) return read_window_table(window_, bootstrap.stream(), mapped);
    for (int peer = 0; peer < num_ranks; ++peer) {
      const int result = nccl_->peer_pointer(window_, 0, peer, &(*mapped)[peer]);
      if (result != NcclApi::kSuccess) {
        return nccl_->failure("ncclGetLsaDevicePointer", result);
      }
    }
    return {};
  }

  const NcclApi* nccl_ = nullptr;
  Communicator communicator_ = nullptr;
  double timeout_seconds_ = 0;
  uint64_t bytes_ = 0;
  void* buffer_ = nullptr;
  Window window_ = nullptr;
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
