// Ranks as threads, in one process or in several that are played, and the programs that they run.
#pragma once

#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "fakes.h"
#include "transport/registry.h"

using namespace megamoe::transport;

constexpr uint64_t kMiB = 1 << 20;
constexpr double kShort = 0.1, kLong = 30;  // seconds: for ranks that don't come, and for those that do

struct View {
  void* mapped[4];
  uint64_t bytes;
  int rank, num_ranks;
};

inline void fill_view(void* image, void* const* mapped, int rank, int num_ranks, uint64_t bytes) {
  View* view = static_cast<View*>(image);
  for (int r = 0; r < num_ranks; ++r) view->mapped[r] = mapped[r];
  view->bytes = bytes;
  view->rank = rank;
  view->num_ranks = num_ranks;
}

inline std::string read_note(uint64_t record, int rank) {
  return "rank " + std::to_string(rank) + " left a " + static_cast<char>(record);
}

constexpr Layout kLayout = {1, sizeof(View), fill_view, read_note};
constexpr Layout kOtherLayout = {2, sizeof(View), fill_view, nullptr};

// A group, and call sites of it. Communicators and registries are never freed: sessions are for ever.
struct World {
  int num_ranks;
  fakes::Clique* clique = new fakes::Clique();
  std::vector<void*>* windows = nullptr;
  fakes::Comm* comms;
  std::vector<int> processes;         // by rank
  std::vector<Registry*> registries;  // by process
  std::vector<Result> results;        // of the last run, by rank
  std::vector<std::shared_ptr<const Member>> members;
  int64_t last_run = 0;

  explicit World(int num_ranks, int num_processes = 1, bool has_windows = false)
      : num_ranks(num_ranks), comms(new fakes::Comm[num_ranks]), results(num_ranks), members(num_ranks) {
    clique->num_ranks = num_ranks;
    if (has_windows) windows = new std::vector<void*>(num_ranks);
    // Devices in another order than ranks.
    for (int r = 0; r < num_ranks; ++r) {
      comms[r] = {clique, r, num_ranks - 1 - r, 0, windows};
      processes.push_back(r % num_processes);
    }
    for (int p = 0; p < num_processes; ++p) registries.push_back(new Registry());
  }

  using Change = std::function<void(int, Request*)>;

  Result enter(int rank, Request request) {
    fakes::process = processes[rank];
    results[rank] = registries[processes[rank]]->enter(request, &members[rank]);
    if (cudaGetLastError() != cudaSuccess) {
      std::lock_guard<std::mutex> lock(fakes::driver().mutex);
      fakes::driver().faults.push_back("an error is left behind for whoever asks for the last one");
    }
    return results[rank];
  }
  Request request(int rank, uint64_t bytes, double seconds = kLong) {
    return {&comms[rank], bytes, last_run, &kLayout, Wanted::kAny, seconds};
  }

  std::vector<int> all() const {
    std::vector<int> ranks;
    for (int r = 0; r < num_ranks; ++r) ranks.push_back(r);
    return ranks;
  }

  // A call site of a run, on some ranks at the same time.
  void call(uint64_t bytes, const std::vector<int>& ranks, double seconds = kLong, const Change& change = {}) {
    std::vector<std::thread> threads;
    for (const int rank : ranks) {
      threads.emplace_back([=, this_world = this, &change] {
        Request request = this_world->request(rank, bytes, seconds);
        if (change) change(rank, &request);
        this_world->enter(rank, request);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  // A new run, of one call site.
  void run(uint64_t bytes, const std::vector<int>& ranks, double seconds = kLong, const Change& change = {}) {
    ++last_run;
    call(bytes, ranks, seconds, change);
  }
  void run(uint64_t bytes) { run(bytes, all()); }

  bool all_are(State state) const {
    for (const Result& result : results) {
      if (result.state != state) return false;
    }
    return true;
  }
  const View& view(int rank) const { return *static_cast<const View*>(members[rank]->view()); }
  void leave(int rank, char what) { __atomic_store_n(members[rank]->note(), what, __ATOMIC_RELEASE); }

  // All ranks see the same zeroed buffers of at least so many bytes, and no note.
  bool is_whole(uint64_t bytes) const {
    if (!all_are(State::kOk)) return false;
    for (int r = 0; r < num_ranks; ++r) {
      const Member& member = *members[r];
      const View& seen = view(r);
      if (seen.rank != r || seen.num_ranks != num_ranks || seen.bytes != member.bytes() || seen.bytes < bytes)
        return false;
      if (seen.bytes != view(0).bytes || *member.note() != 0) return false;
      if (windows == nullptr && std::memcmp(seen.mapped, view(0).mapped, num_ranks * sizeof(void*)) != 0) return false;
      const char* own = static_cast<const char*>(seen.mapped[r]);
      if (own[0] != 0 || std::memcmp(own, own + 1, seen.bytes - 1) != 0) return false;
    }
    return true;
  }
};

inline int num_failed = 0;

inline void expect(bool good, const char* what, const char* file, int line) {
  if (good) return;
  std::printf("%s:%d: expected %s\n", std::strrchr(file, '/') + 1, line, what);
  ++num_failed;
}
#define EXPECT(condition) expect(condition, #condition, __FILE__, __LINE__)
#define EXPECT_CONTAINS(text, part) expect((text).find(part) != std::string::npos, (text).c_str(), __FILE__, __LINE__)

// Parts of the program, a file each.
void test_set_up();
void test_late_ranks();
void test_recovery();
