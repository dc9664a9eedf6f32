#include "transport/symmetric_memory.h"

#include <cstring>
#include <utility>

namespace megamoe::transport {

std::string SymmetricMemory::create(const Request& request, std::unique_ptr<SymmetricMemory>* result) {
  std::unique_ptr<SymmetricMemory> memory(new SymmetricMemory());
  const std::string failure = memory->open(request);
  if (failure.empty()) {
    memory->read_note_ = request.read_note;
    if (request.read_note != nullptr && memory->num_ranks() > 1) {
      watch(memory->note_, memory->rank(), request.read_note);
    }
    *result = std::move(memory);
  } else if (memory->exchange_.is_stuck()) {
    memory.release();  // freeing anything would wait for the stream that waits for a rank which never came
  }
  return failure;
}

SymmetricMemory::~SymmetricMemory() {
  if (read_note_ != nullptr && num_ranks() > 1) unwatch(note_);
  DeviceScope scope(device());
  cudaFree(table_);
  cudaFreeHost(note_);
}

std::string SymmetricMemory::failure() const {
  return read_note_ == nullptr ? std::string() : read_note_(note_, rank());
}

std::string SymmetricMemory::open(const Request& request) {
  std::string failure = exchange_.open(request.communicator, request.device, request.timeout_seconds);
  if (!failure.empty()) return failure;
  bytes_ = request.bytes;

  Introduction own = {};
  own.version = Introduction::kVersion;
  own.device = request.device;
  own.bytes = request.bytes;
  own.layout = request.layout;
  own.wanted = request.wanted;
  own.has_windows = has_windows(exchange_.nccl());
  identify(&own);
  draw_token(own.group);
  std::vector<Introduction> ranks;
  failure = exchange_.gather("introduction", own, &ranks);
  if (!failure.empty()) return failure;
  std::memcpy(group_, ranks[0].group, sizeof(group_));
  failure = make_plan(ranks, rank(), &plan_);
  // What one rank finds wrong another may find right: that of two versions, say.
  failure = exchange_.agree("plan", failure);
  if (failure.empty()) failure = map();
  return failure;
}

std::string SymmetricMemory::map() {
  std::string failures;
  // Peer access and IPC first: they ask nothing but the driver. Windows depend on the version and settings of NCCL, and
  // are what reaches memory where IPC does not, as between hosts that share an NVLink domain.
  for (const bool use_windows : {false, true}) {
    if (use_windows ? !plan_.may_use_windows : !plan_.may_map) continue;
    backing_ = use_windows ? make_window_backing() : make_peer_backing();
    std::string failure = backing_->open(exchange_, plan_, bytes_, &mapped_);
    if (failure.empty()) failure = exchange_.agree("table", write_table());
    if (failure.empty()) return {};
    failures += (failures.empty() ? "" : "; ") + std::string(backing_->name()) + ": " + failure;
    backing_.reset();
  }
  if (!failures.empty()) return "no rank can reach the memory of all others (" + failures + ")";
  return plan_.spans_hosts ? "the ranks are on several hosts, whose memory only NCCL's windows could map, and this "
                             "NCCL, or this build, does not offer them"
                           : "this NCCL, or this build, does not offer windows, and nothing else was asked for";
}

std::string SymmetricMemory::write_table() {
  DeviceScope scope(device());
  const size_t bytes = mapped_.size() * sizeof(void*);
  cudaError_t error = table_ != nullptr ? cudaSuccess : cudaMalloc(reinterpret_cast<void**>(&table_), bytes);
  if (error == cudaSuccess && note_ == nullptr) {
    error = cudaHostAlloc(&note_, kNoteBytes, cudaHostAllocPortable);
    if (error == cudaSuccess) std::memset(note_, 0, kNoteBytes);
  }
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(table_, mapped_.data(), bytes, cudaMemcpyHostToDevice, exchange_.stream());
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(exchange_.stream());
  return error == cudaSuccess ? std::string() : cuda_failure("writing the table of peers", error);
}

}  // namespace megamoe::transport
