#include "transport/bootstrap.h"

#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "common/device_scope.h"

namespace megamoe::transport {

namespace {

// As CUDA answers. That there is still work is no error: the next caller who asks for the last one would take it for
// its own.
cudaError_t query(cudaStream_t stream) {
  const cudaError_t answer = cudaStreamQuery(stream);
  if (answer == cudaErrorNotReady) cudaGetLastError();
  return answer;
}

}  // namespace

std::string Bootstrap::run(double timeout_seconds, const std::function<std::string()>& operation) {
  timeout_seconds_ = timeout_seconds;
  DeviceScope scope(device());
  std::string failure = prepare();
  if (failure.empty() && pending_ != nullptr) {
    failure = await();
    if (failure.empty() && new_mailbox_ != nullptr) settle_mailbox();
  }
  if (failure.empty()) failure = start(operation);
  is_stuck_ = pending_ != nullptr && mailbox_ == nullptr;
  return failure;
}

std::string Bootstrap::start(const std::function<std::string()>& operation) {
  for (int start = 0; start < kMaxStarts; ++start) {
    next_phase_ = 0;
    step_ = Step::kBroken;
    new_mailbox_.reset();
    const std::string failure = operation();
    if (step_ != Step::kApart) return failure;
  }
  return where("start") + ": the ranks began anew " + std::to_string(kMaxStarts) +
         " times and did not get on together; all of them have to run the same program";
}

std::string Bootstrap::prepare() {
  if (staging_ != nullptr) return {};
  std::string reason;
  nccl_ = nccl_api(&reason);
  if (nccl_ == nullptr) return reason;
  cudaError_t error = stream_ != nullptr ? cudaSuccess : cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
  if (error == cudaSuccess) {
    error = cudaMalloc(reinterpret_cast<void**>(&staging_), (num_ranks() + 1) * kRecordBytes);
  }
  if (error == cudaSuccess) return {};
  staging_ = nullptr;
  return cuda_failure("preparing the exchange between ranks", error);
}

std::string Bootstrap::gather_bytes(const char* phase, const void* mine, void* all, size_t bytes) {
  step_ = Step::kBroken;
  const uint64_t number = next_phase_++;
  char record[kRecordBytes] = {};
  std::memcpy(record, &number, sizeof(number));
  std::memcpy(record + sizeof(number), mine, bytes);
  std::string failure;
  if (mailbox_ != nullptr) {
    mailbox_->post(rank(), record);
  } else {
    failure = enqueue(phase, record);
  }
  if (!failure.empty()) return failure;
  pending_ = phase;
  failure = await();
  if (!failure.empty()) return failure;
  step_ = Step::kTogether;
  for (int peer = 0; peer < num_ranks(); ++peer) {
    const char* received = received_.data() + peer * kRecordBytes;
    if (std::memcmp(received, &number, sizeof(number)) != 0) step_ = Step::kApart;
    std::memcpy(static_cast<char*>(all) + peer * bytes, received + sizeof(number), bytes);
  }
  return step_ == Step::kTogether ? std::string() : where(phase) + ": the ranks are at different steps";
}

bool Bootstrap::is_stuck() const {
  // The rank that was missing may have come since.
  if (!is_stuck_) return false;
  DeviceScope scope(device());
  return query(stream_) == cudaErrorNotReady;
}

std::string Bootstrap::enqueue(const char* phase, const char* record) {
  const cudaError_t error = cudaMemcpyAsync(staging_, record, kRecordBytes, cudaMemcpyHostToDevice, stream_);
  if (error != cudaSuccess) return cuda_failure(where(phase) + ": copying", error);
  const int enqueued =
      nccl_->all_gather(staging_, staging_ + kRecordBytes, kRecordBytes, NcclApi::kUint8, communicator_, stream_);
  if (enqueued == NcclApi::kSuccess || enqueued == NcclApi::kInProgress) return {};
  return nccl_->failure(where(phase) + ": ncclAllGather", enqueued);
}

std::string Bootstrap::await() {
  received_.resize(num_ranks() * kRecordBytes);
  // Asked and not waited for: a rank that never comes has to end in an error.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_seconds_);
  for (bool ended = false;; std::this_thread::sleep_for(std::chrono::microseconds(20))) {
    const std::string failure = has_ended(&ended);
    if (!failure.empty()) return failure;
    if (ended) break;
    if (std::chrono::steady_clock::now() > deadline) {
      return where(pending_) + ": the other ranks did not come within " +
             std::to_string(static_cast<int>(timeout_seconds_)) + " s; all of them have to run the same program";
    }
  }
  pending_ = nullptr;
  return {};
}

std::string Bootstrap::has_ended(bool* ended) {
  if (mailbox_ != nullptr) {
    *ended = mailbox_->collect(received_.data());
    return {};
  }
  // In NCCL's non-blocking mode the all-gather comes to the stream later than the call returns.
  int state = NcclApi::kSuccess;
  if (const int asked = nccl_->async_error(communicator_, &state); asked != NcclApi::kSuccess) state = asked;
  if (state == NcclApi::kInProgress) return {};
  if (state != NcclApi::kSuccess) return nccl_->failure(where(pending_) + ": ncclAllGather", state);
  cudaError_t error = query(stream_);
  if (error == cudaErrorNotReady) return {};
  if (error == cudaSuccess) {
    error =
        cudaMemcpyAsync(received_.data(), staging_ + kRecordBytes, received_.size(), cudaMemcpyDeviceToHost, stream_);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream_);
  *ended = error == cudaSuccess;
  return *ended ? std::string() : cuda_failure(where(pending_), error);
}

std::string Bootstrap::make_mailbox(const std::string& name) {
  auto mailbox = std::make_unique<Mailbox>();
  std::string obstacle = agree("mailbox", rank() == 0 ? mailbox->create(name, num_ranks()) : std::string());
  if (is_in_step() && obstacle.empty()) {
    obstacle = rank() == 0 ? std::string() : mailbox->open(name, num_ranks());
    new_mailbox_ = std::move(mailbox);
    obstacle = agree("mailbox opened", obstacle);
    if (is_in_step()) settle_mailbox();
  }
  if (rank() == 0) Mailbox::remove(name);
  return is_in_step() ? std::string() : obstacle;
}

// What the ranks have said last decides, also for one that heard of it in its next operation only.
void Bootstrap::settle_mailbox() {
  bool all_have_it = true;
  for (int peer = 0; peer < num_ranks(); ++peer) {
    // At another step: that rank has begun anew, and so will all.
    const bool same_step =
        std::memcmp(&received_[peer * kRecordBytes], &received_[rank() * kRecordBytes], sizeof(uint64_t)) == 0;
    all_have_it = all_have_it && same_step && received_[peer * kRecordBytes + sizeof(uint64_t)] == '\0';
  }
  if (all_have_it) mailbox_ = std::move(new_mailbox_);
  new_mailbox_.reset();
}

std::string Bootstrap::agree(const char* phase, const std::string& own_failure) {
  struct Verdict {
    char text[kPayloadBytes];
  };
  Verdict mine = {};
  std::strncpy(mine.text, own_failure.c_str(), sizeof(mine.text) - 1);
  std::vector<Verdict> all;
  const std::string failure = gather(phase, mine, &all);
  if (!failure.empty()) return failure;
  std::string joined;
  for (int peer = 0; peer < num_ranks(); ++peer) {
    if (all[peer].text[0] == '\0') continue;
    joined += (joined.empty() ? "rank " : "; rank ") + std::to_string(peer) + ": " + all[peer].text;
  }
  return joined;
}

std::string Bootstrap::where(const char* phase) const {
  return "rank " + std::to_string(rank()) + " of " + std::to_string(num_ranks()) + ", phase " + phase;
}

}  // namespace megamoe::transport
