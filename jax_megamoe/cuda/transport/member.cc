#include "transport/member.h"

#include <algorithm>
#include <chrono>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "common/device_scope.h"

namespace megamoe::transport {

namespace {

// Until the device has nothing to do, or the time is over: somebody else's kernel may wait for a process that died.
std::string await_idle_device(int device, double timeout_seconds) {
  auto idle = std::make_shared<std::promise<cudaError_t>>();
  std::future<cudaError_t> outcome = idle->get_future();
  std::thread([device, idle] {
    DeviceScope scope(device);
    idle->set_value(cudaDeviceSynchronize());
  }).detach();
  if (outcome.wait_for(std::chrono::duration<double>(timeout_seconds)) != std::future_status::ready) {
    return "device " + std::to_string(device) + " was still busy after " +
           std::to_string(static_cast<int>(timeout_seconds)) + " s; something on it may wait for a process that died";
  }
  const cudaError_t error = outcome.get();
  return error == cudaSuccess ? std::string() : cuda_failure("waiting for the device", error);
}

}  // namespace

Member::~Member() {
  if (note_ != nullptr) unwatch(note_);
  DeviceScope scope(device());
  buffer_.close();
  cudaFree(view_);
  cudaFreeHost(note_);
}

std::string Member::failure() const {
  const uint64_t record = note_ == nullptr ? 0 : load_note(note_);
  return record == 0 || layout_.read_note == nullptr ? std::string() : layout_.read_note(record, rank());
}

Result Member::rebuild(const Wish& wish) {
  is_ready_ = false;
  Result result = {State::kNotSetUp, {}};
  result.text = bootstrap_.run(wish.timeout_seconds, [&] { return build(wish, &result.state); });
  if (!result.text.empty()) return result;
  if (layout_.read_note != nullptr && num_ranks() > 1) watch(note_, rank(), layout_.read_note);
  is_ready_ = true;
  return {State::kOk, {}};
}

std::string Member::build(const Wish& wish, State* state) {
  // Kernels that use the buffer end by themselves; what they leave in the note is known then.
  std::string own_failure = wish.obstacle;
  if (own_failure.empty() && view_ != nullptr) own_failure = await_idle_device(device(), wish.timeout_seconds);
  std::vector<Introduction> ranks;
  std::string failure = bootstrap_.gather("introduction", introduction(wish), &ranks);
  if (!failure.empty()) return failure;
  Topology topology;
  const std::string disagreement = read_topology(ranks, rank(), &topology);
  // What one rank finds wrong another may find right: that of two versions, say.
  failure = bootstrap_.agree("topology", own_failure.empty() ? disagreement : own_failure);
  if (!failure.empty()) return failure;
  for (int peer = 0; peer < num_ranks(); ++peer) {
    if (ranks[peer].failure == 0) continue;
    *state = State::kFailed;
    return layout_.read_note(ranks[peer].failure, peer);
  }

  if (!topology.keeps_buffers) failure = buffer_.replace(bootstrap_, topology);
  if (!failure.empty()) return failure;
  failure = buffer_.clear(bootstrap_);
  if (failure.empty()) failure = write_view();
  failure = bootstrap_.agree("view", failure);
  if (failure.empty() && !topology.spans_hosts && !bootstrap_.has_mailbox()) {
    failure = bootstrap_.make_mailbox(mailbox_name(topology.group));
  }
  if (!failure.empty()) return failure;
  largest_ = topology.bytes;
  group_ = topology.group;
  generation_ = topology.generation;
  return {};
}

std::string Member::mailbox_name(uint64_t group) { return "/jax_megamoe-" + std::to_string(group); }

Introduction Member::introduction(const Wish& wish) const {
  Introduction own = {};
  own.version = Introduction::kVersion;
  own.device = device();
  own.identity = identify();
  own.layout = layout_.id;
  own.wanted = wanted_;
  own.has_windows = has_windows(bootstrap_.nccl());
  own.bytes = std::max(size_class(wish.bytes), largest_);
  own.generation = buffer_.generation();
  own.buffer_bytes = buffer_.bytes();
  own.group = group_;
  own.token = draw_token();
  if (!failure().empty() && !wish.is_told) own.failure = load_note(note_);
  return own;
}

std::string Member::write_view() {
  cudaError_t error = view_ != nullptr ? cudaSuccess : cudaMalloc(&view_, layout_.view_bytes);
  if (error == cudaSuccess && note_ == nullptr) {
    error = cudaHostAlloc(reinterpret_cast<void**>(&note_), sizeof(uint64_t), cudaHostAllocPortable);
  }
  if (error == cudaSuccess) {
    __atomic_store_n(note_, 0, __ATOMIC_RELEASE);
    std::vector<void*> mapped;
    for (int peer = 0; peer < num_ranks(); ++peer) mapped.push_back(buffer_.mapped(peer));
    std::vector<uint64_t> image((layout_.view_bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t));
    layout_.fill(image.data(), mapped.data(), rank(), num_ranks(), buffer_.bytes());
    error = cudaMemcpyAsync(view_, image.data(), layout_.view_bytes, cudaMemcpyHostToDevice, bootstrap_.stream());
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(bootstrap_.stream());
  return error == cudaSuccess ? std::string() : cuda_failure("writing the view of the group", error);
}

}  // namespace megamoe::transport
