#include "transport/watcher.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
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

  void add(const void* note, int rank, ReadNote read) {
    std::lock_guard<std::mutex> lock(mutex_);
    watched_[note] = {rank, read};
  }

  void remove(const void* note) {
    std::lock_guard<std::mutex> lock(mutex_);
    watched_.erase(note);
  }

 private:
  struct Watched {
    int rank;
    ReadNote read;
  };

  Watcher() {
    // The driver unmaps notes while the process exits. It was set up before any note, so that this runs before its part.
    std::atexit([] {
      std::lock_guard<std::mutex> lock(get().mutex_);
      get().watched_.clear();
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
    for (auto watched = watched_.begin(); watched != watched_.end();) {
      std::string failure = watched->second.read(watched->first, watched->second.rank);
      if (failure.empty()) {
        ++watched;
      } else {
        // A note is written once.
        failures.push_back(std::move(failure));
        watched = watched_.erase(watched);
      }
    }
    return failures;
  }

  std::mutex mutex_;
  std::map<const void*, Watched> watched_;
};

}  // namespace

void watch(const void* note, int rank, ReadNote read) { Watcher::get().add(note, rank, read); }

void unwatch(const void* note) { Watcher::get().remove(note); }

}  // namespace megamoe::transport
