#include "transport/watcher.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

namespace megamoe::transport {

namespace {

class Watcher {
 public:
  // Never destroyed: its thread may outlive all destructors.
  static Watcher& get() {
    static Watcher* watcher = new Watcher();
    return *watcher;
  }

  void add(const uint64_t* note, int rank, ReadNote read) {
    std::lock_guard<std::mutex> lock(mutex_);
    watched_[note] = {rank, read, 0};
  }

  void remove(const uint64_t* note) {
    std::lock_guard<std::mutex> lock(mutex_);
    watched_.erase(note);
  }

 private:
  struct Watched {
    int rank;
    ReadNote read;
    uint64_t told;
  };

  Watcher() {
    // The driver unmaps notes while the process exits. It was set up before any note, so that this runs before its
    // part.
    std::atexit([] {
      Watcher& watcher = get();
      // A child of a fork has no such thread, and may have inherited the lock from it.
      if (getpid() != watcher.process_) return;
      std::lock_guard<std::mutex> lock(watcher.mutex_);
      watcher.watched_.clear();
    });
    // Detached: the end of the process waits for nobody.
    std::thread([this] {
      for (;; std::this_thread::sleep_for(std::chrono::milliseconds(500))) {
        // Written without the lock, since a pipe that nobody reads blocks.
        for (const std::string& failure : new_failures()) std::fprintf(stderr, "jax_megamoe: %s\n", failure.c_str());
      }
    }).detach();
  }

  std::vector<std::string> new_failures() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::string> failures;
    for (auto& [note, watched] : watched_) {
      const uint64_t record = load_note(note);
      if (record != 0 && record != watched.told) failures.push_back(watched.read(record, watched.rank));
      watched.told = record;
    }
    return failures;
  }

  const pid_t process_ = getpid();
  std::mutex mutex_;
  std::map<const uint64_t*, Watched> watched_;
};

}  // namespace

void watch(const uint64_t* note, int rank, ReadNote read) { Watcher::get().add(note, rank, read); }

void unwatch(const uint64_t* note) { Watcher::get().remove(note); }

}  // namespace megamoe::transport
