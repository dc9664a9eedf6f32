// The set-up of symmetric memory with ranks as threads: decisions, agreement, time limits and lifetimes, without a GPU.
#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <thread>

#include "fakes.h"
#include "transport/registry.h"
#include "transport/window_table.h"

using namespace megamoe::transport;

// The parts of the CUDA runtime that the transport calls, over host memory.
namespace {
thread_local int current_device = 0;
std::atomic<int> live_allocations{0};
std::set<std::pair<int, int>> unreachable;  // (from, to)
}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current_device = device, cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "a fake error"; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaMalloc(void** result, size_t bytes) {
  ++live_allocations;
  *result = std::malloc(bytes);
  std::memset(*result, 0xa5, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* buffer) {
  live_allocations -= buffer != nullptr;
  std::free(buffer);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** result, size_t bytes, unsigned) { return cudaMalloc(result, bytes); }
cudaError_t cudaFreeHost(void* buffer) { return cudaFree(buffer); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(new fakes::Stream());
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  fakes::Stream* stream = reinterpret_cast<fakes::Stream*>(handle);
  if (stream->clique == nullptr) return cudaSuccess;
  std::lock_guard<std::mutex> lock(stream->clique->mutex);
  const auto& ranks = stream->clique->contributions[stream->step];
  if (static_cast<int>(ranks.size()) < stream->clique->num_ranks) return cudaErrorNotReady;
  char* out = stream->received;
  for (const auto& [rank, bytes] : ranks)
    out = static_cast<char*>(std::memcpy(out, bytes.data(), bytes.size())) + bytes.size();
  stream->clique = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  while (cudaStreamQuery(stream) == cudaErrorNotReady) std::this_thread::yield();
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<fakes::Stream*>(stream);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* possible, int from, int to) {
  return *possible = unreachable.count({from, to}) == 0, cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaErrorPeerAccessAlreadyEnabled; }
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return cudaErrorNotSupported; }
cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) { return cudaErrorNotSupported; }
cudaError_t cudaIpcCloseMemHandle(void*) { return cudaErrorNotSupported; }
}

namespace megamoe::transport {
bool can_read_window_table(int) { return false; }
std::string read_window_table(Window, cudaStream_t, std::vector<void*>*) { return "not asked"; }
}  // namespace megamoe::transport

namespace {

constexpr int kRanks = 3;
constexpr uint64_t kBytes = 3 << 20;

struct Ranks {
  fakes::Clique clique;
  std::vector<void*> windows = std::vector<void*>(kRanks);
  // Never freed: the process keeps some groups, by the addresses of their communicators.
  fakes::Comm* comms = new fakes::Comm[kRanks];
  std::shared_ptr<SymmetricGroup> groups[kRanks];
  std::string failures[kRanks];

  explicit Ranks(bool has_windows = false) {
    clique.num_ranks = kRanks;
    // Devices in another order than ranks.
    for (int r = 0; r < kRanks; ++r) comms[r] = {&clique, r, kRanks - 1 - r, 0, has_windows ? &windows : nullptr};
  }

  void acquire_all(const std::function<void(int, Request*)>& change = {}, int present = kRanks) {
    std::vector<std::thread> threads;
    for (int r = 0; r < present; ++r) {
      threads.emplace_back([this, r, &change] {
        Request request{&comms[r], comms[r].device, kBytes, 1};
        request.timeout_seconds = 1;
        if (change) change(r, &request);
        failures[r] = acquire(request, &groups[r]);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  const SymmetricMemory& memory(int rank) { return *groups[rank]->on_device(comms[rank].device); }
};

int num_failed = 0;

void expect(bool good, const char* what, int line) {
  if (good) return;
  std::printf("line %d: expected %s\n", line, what);
  ++num_failed;
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)
#define EXPECT_CONTAINS(text, part) expect((text).find(part) != std::string::npos, (text).c_str(), __LINE__)

void test_all_ranks_see_all_buffers() {
  Ranks ranks;
  ranks.acquire_all();
  for (int r = 0; r < kRanks; ++r) {
    EXPECT(ranks.failures[r].empty());
    EXPECT(ranks.groups[r] == ranks.groups[0]);
    const SymmetricMemory& memory = ranks.memory(r);
    EXPECT(memory.rank() == r && memory.num_ranks() == kRanks && memory.bytes() >= kBytes);
    EXPECT(memory.peers()[r] == memory.local());
    for (int peer = 0; peer < kRanks; ++peer) EXPECT(memory.peers()[peer] == ranks.memory(peer).local());
    EXPECT(std::string(memory.transport()) == "peer access");
    const char* bytes = static_cast<const char*>(memory.local());
    EXPECT(bytes[0] == 0 && std::memcmp(bytes, bytes + 1, memory.bytes() - 1) == 0);
  }
}

void test_sharing_and_lifetime() {
  Ranks ranks, later;
  const int before = live_allocations;
  ranks.acquire_all();
  const int with_one = live_allocations;
  for (int r = 0; r < kRanks; ++r) later.comms[r] = ranks.comms[r];
  // The same class of sizes: found by each rank alone, without the others.
  for (int r = 0; r < kRanks; ++r) {
    EXPECT(acquire({&ranks.comms[r], ranks.comms[r].device, kBytes - 4096, 1}, &later.groups[r]).empty());
    EXPECT(later.groups[r] == ranks.groups[0]);
  }
  EXPECT(live_allocations == with_one);
  for (auto& group : ranks.groups) group.reset();
  EXPECT(live_allocations == with_one && describe_all().size() == kRanks);
  for (auto& group : later.groups) group.reset();
  EXPECT(live_allocations == before && describe_all().empty());
  // Made anew after it was given back; another layout has its own.
  ranks.acquire_all();
  const std::shared_ptr<SymmetricGroup> first = ranks.groups[0];
  ranks.acquire_all([](int, Request* request) { request->layout = 2; });
  for (int r = 0; r < kRanks; ++r) EXPECT(ranks.failures[r].empty() && ranks.groups[r] != first);
}

void test_ranks_that_disagree() {
  Ranks ranks;
  const int before = live_allocations;
  ranks.acquire_all([](int r, Request* request) { request->bytes = r == 1 ? 2 * kBytes : kBytes; });
  for (const std::string& failure : ranks.failures)
    EXPECT_CONTAINS(failure, "rank 1 and rank 0 want symmetric buffers");
  EXPECT(live_allocations == before);
}

void test_a_rank_that_does_not_come() {
  Ranks ranks;
  ranks.acquire_all({}, kRanks - 1);
  for (int r = 0; r < kRanks - 1; ++r) {
    EXPECT_CONTAINS(ranks.failures[r],
                    "rank " + std::to_string(r) + " of 3, phase introduction: the other ranks did not");
  }
}

void test_windows_where_there_is_no_peer_access() {
  unreachable = {{2, 0}};  // device 2 is rank 0
  Ranks without;
  without.acquire_all();
  for (const std::string& failure : without.failures) {
    EXPECT_CONTAINS(failure, "rank 0: there is no peer access from device 2 to device 0");
    EXPECT_CONTAINS(failure, "NCCL registers no symmetric windows");
  }
  Ranks with(true);
  with.acquire_all();
  unreachable.clear();
  for (int r = 0; r < kRanks; ++r) {
    EXPECT(with.failures[r].empty());
    if (!with.failures[r].empty()) continue;
    EXPECT(std::string(with.memory(r).transport()) == "NCCL window");
    for (int peer = 0; peer < kRanks; ++peer) EXPECT(with.memory(r).peers()[peer] == with.windows[peer]);
  }
  for (auto& group : with.groups) group.reset();
  EXPECT(describe_all().size() == kRanks);  // windows are kept
}

// What the process writes to stderr while this lives; standard error again afterwards.
class Stderr {
 public:
  Stderr() : before_(dup(2)), file_(std::tmpfile()) { dup2(fileno(file_), 2); }
  ~Stderr() {
    dup2(before_, 2);
    close(before_);
    std::fclose(file_);
  }
  std::string text() const {
    char bytes[4096];
    return std::string(bytes, pread(fileno(file_), bytes, sizeof(bytes), 0));
  }
  bool comes(const std::string& part) const {
    for (int tries = 0; tries < 100; ++tries, std::this_thread::sleep_for(std::chrono::milliseconds(50))) {
      if (text().find(part) != std::string::npos) return true;
    }
    return false;
  }

 private:
  int before_;
  std::FILE* file_;
};

std::atomic<bool> is_driver_gone{false};

std::string read_note(const void* note, int rank) {
  if (is_driver_gone) _exit(3);
  const char phase = *static_cast<const volatile char*>(note);
  return phase == 0 ? std::string() : "rank " + std::to_string(rank) + " left a " + phase;
}

void leave(const SymmetricMemory& memory, char phase) { *static_cast<volatile char*>(memory.note()) = phase; }

void test_failures_are_told_once() {
  const auto with_notes = [](int, Request* request) { request->read_note = read_note; };
  Stderr written;
  Ranks ranks, silent, again;
  ranks.acquire_all(with_notes);
  silent.acquire_all();  // the note of another handler, in words that nobody here knows
  for (const Description& memory : describe_all()) EXPECT(memory.failure.empty());
  leave(silent.memory(0), 'c');
  leave(ranks.memory(1), 'a');
  EXPECT(written.comes("jax_megamoe: rank 1 left a a\n"));
  leave(ranks.memory(2), 'b');
  EXPECT(written.comes("jax_megamoe: rank 2 left a b\n"));
  int num_failures = 0;
  for (const Description& memory : describe_all()) num_failures += !memory.failure.empty();
  EXPECT(num_failures == 2);
  // Groups that go away are looked at no more; their notes are freed memory.
  for (auto& group : ranks.groups) group.reset();
  again.acquire_all(with_notes);
  leave(again.memory(0), 'd');
  EXPECT(written.comes("rank 0 left a d\n"));
  EXPECT(written.text() ==
         "jax_megamoe: rank 1 left a a\njax_megamoe: rank 2 left a b\njax_megamoe: rank 0 left a d\n");
}

// The process ends while notes are watched: nobody waits for the watcher, and it does not read them any more.
void end_with_a_group() {
  static Ranks* ranks = new Ranks();
  ranks->acquire_all([](int, Request* request) { request->read_note = read_note; });
}

void test_plans() {
  std::vector<Introduction> ranks(4);
  for (int r = 0; r < 4; ++r) {
    ranks[r].version = Introduction::kVersion;
    ranks[r].device = r % 2;
    ranks[r].process[0] = r / 2;
  }
  Plan plan;
  EXPECT(make_plan(ranks, 1, &plan).empty());
  const std::vector<Reach> wanted = {Reach::kSameProcess, Reach::kSelf, Reach::kSameHost, Reach::kSameHost};
  EXPECT(plan.reach == wanted && plan.spans_processes && plan.may_map && !plan.may_use_windows);
  ranks[3].host[1] = 1;
  EXPECT(make_plan(ranks, 1, &plan).empty());
  EXPECT(plan.reach[3] == Reach::kOtherHost && plan.spans_hosts && !plan.may_map);
  ranks[1].device = 0;
  EXPECT_CONTAINS(make_plan(ranks, 2, &plan), "rank 0 and rank 1 are both on device 0");
  ranks[1].device = 1;
  ranks[1].version = 99;
  EXPECT_CONTAINS(make_plan(ranks, 2, &plan), "different versions");
}

void test_size_classes() {
  EXPECT(size_class(1) == 2 << 20 && size_class(2 << 20) == 2 << 20);
  for (uint64_t bytes : {(2ull << 20) + 1, 5ull << 20, 100ull << 20, (1ull << 30) - 1, 3ull << 30}) {
    const uint64_t rounded = size_class(bytes);
    EXPECT(rounded >= bytes && rounded - bytes <= bytes / 8 && size_class(rounded) == rounded);
  }
}

}  // namespace

int main(int, char** arguments) {
  // Before any group, as the driver does.
  std::atexit([] {
    is_driver_gone = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(700));
  });
  if (dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::printf("%s\n", dlerror());
    return 2;
  }
  test_size_classes();
  test_plans();
  test_all_ranks_see_all_buffers();
  test_sharing_and_lifetime();
  test_ranks_that_disagree();
  test_windows_where_there_is_no_peer_access();
  test_a_rank_that_does_not_come();
  test_failures_are_told_once();
  end_with_a_group();
  std::printf("%d failed\n", num_failed);
  return num_failed != 0;
}
