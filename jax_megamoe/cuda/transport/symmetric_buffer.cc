#include "transport/symmetric_buffer.h"

#include "common/device_scope.h"

namespace megamoe::transport {

std::string SymmetricBuffer::replace(Bootstrap& bootstrap, const Topology& topology) {
  std::string failure = give_back(bootstrap, "release");
  if (!failure.empty()) return failure;
  std::string failures;
  // Peer access and IPC first: they ask nothing but the driver. Windows depend on the version and settings of NCCL, and
  // are what reaches memory where IPC does not, as between hosts that share an NVLink domain.
  for (const bool use_windows : {false, true}) {
    if (use_windows ? !topology.may_use_windows : !topology.may_map) continue;
    backing_ = use_windows ? make_window_backing() : make_peer_backing();
    std::string unreachable;
    failure = open(bootstrap, topology, &unreachable);
    if (!failure.empty() || unreachable.empty()) return failure;
    failures += (failures.empty() ? "" : "; ") + std::string(backing_->name()) + ": " + unreachable;
    failure = give_back(bootstrap, "unmapping");
    if (!failure.empty()) return failure;
  }
  const std::string remedy = "; where GPUs can't reach each other's memory, pass implementation=\"collective\"";
  if (!failures.empty()) return "no rank can reach the memory of all others (" + failures + ")" + remedy;
  if (!topology.spans_hosts) return "this NCCL, or this build, does not offer windows, and nothing else was asked for";
  return "the ranks are on several hosts, whose memory only NCCL's windows could map, and this NCCL, or this build, "
         "does not offer them" +
         remedy;
}

std::string SymmetricBuffer::open(Bootstrap& bootstrap, const Topology& topology, std::string* unreachable) {
  std::string failure = bootstrap.agree("allocation", backing_->allocate(bootstrap, topology.bytes));
  if (!failure.empty()) {
    // Nobody has mapped anything yet.
    if (bootstrap.is_in_step()) close();
    return failure;
  }
  failure = backing_->map(bootstrap, topology, &mapped_);
  if (!bootstrap.is_in_step()) return failure;
  failure = bootstrap.agree("mapping", failure);
  if (!bootstrap.is_in_step()) return failure;
  *unreachable = failure;
  if (!failure.empty()) return {};
  generation_ = topology.generation;
  spans_processes_ = topology.spans_processes;
  transport_ = backing_->name();
  bytes_ = topology.bytes;
  return {};
}

std::string SymmetricBuffer::give_back(Bootstrap& bootstrap, const char* phase) {
  bytes_ = generation_ = 0;
  mapped_.clear();
  if (backing_ != nullptr) backing_->unmap();
  const std::string failure = bootstrap.agree(phase, "");
  if (failure.empty()) close();
  return failure;
}

std::string SymmetricBuffer::clear(Bootstrap& bootstrap) {
  cudaError_t error = cudaMemsetAsync(mapped_[bootstrap.rank()], 0, bytes_, bootstrap.stream());
  if (error == cudaSuccess) error = cudaStreamSynchronize(bootstrap.stream());
  return error == cudaSuccess ? std::string() : cuda_failure("clearing the buffer", error);
}

void SymmetricBuffer::close() {
  bytes_ = generation_ = 0;
  if (backing_ != nullptr) {
    backing_->unmap();
    backing_->release();
  }
  backing_.reset();
}

}  // namespace megamoe::transport
