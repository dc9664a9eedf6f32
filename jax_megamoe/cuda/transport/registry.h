// The expert groups of this process, and what each run of a program finds of them.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "transport/bootstrap.h"
#include "transport/member.h"

namespace megamoe::transport {

struct Request {
  Communicator communicator;  // says what the device is
  uint64_t bytes;
  int64_t run_id;  // of the program: the same on all devices of the process
  const Layout* layout;
  Wanted wanted = Wanted::kAny;
  double timeout_seconds = 120;  // of each step of a set-up: ranks may differ in how long they compile
};

struct Description {
  int device, rank, num_ranks;
  uint64_t bytes;
  std::string transport;
  bool spans_processes;
  std::string failure;  // why the rank can't go on, or nothing
};

class Registry {
 public:
  // That of the process; never destroyed, since at process exit the driver may be gone before it would be.
  static Registry& get();

  // In Initialize of every call site in every run, on each device's own host thread. Where the group is well and its
  // buffer is large enough, nothing is asked of CUDA. Otherwise all ranks of the communicator have to be here. In the
  // first run that begins after a wait has failed on any rank of this process, all devices of the run get that failure.
  // In the next one the ranks set up the group anew.
  //
  // Whoever keeps *member keeps the group, on all devices of the process. Of groups that span processes, and of
  // windows, the process keeps them for ever: executables are dropped at different times in different processes.
  Result enter(const Request& request, std::shared_ptr<const Member>* member);

  std::vector<Description> describe_all();

 private:
  // What a communicator has one group of.
  struct Kind {
    uint32_t layout;
    Wanted wanted;

    bool operator<(const Kind& other) const { return std::tie(layout, wanted) < std::tie(other.layout, other.wanted); }
  };

  // The ranks that this process has of one group. They live and die together, so that all of them find it alive, or
  // none.
  struct Group {
    ~Group();

    uint64_t name;
    // Groups that were in one run together, as along an axis of a mesh, are one cohort: XLA lets none of their devices
    // go on before all do, so that all of them have to be told of a failure, or none.
    uint64_t cohort;
    std::map<int, std::shared_ptr<Member>> members;  // by device
    uint64_t generation = 0;                         // names the last set-up that succeeded
    bool is_told = false;                            // the failure in its notes has been raised since then
    bool is_pending = false;                         // a set-up has failed since then
  };
  using Groups = std::vector<std::shared_ptr<Group>>;

  // What the first device that came with it found; it holds for all of them.
  struct Run {
    int64_t id;
    uint64_t cohort;                    // of those that came with it, or 0
    std::string failure;                // to be raised in this run
    std::vector<uint64_t> generations;  // of groups that this run sets up anew
  };

  struct Slot {
    std::weak_ptr<Group> group;
    std::shared_ptr<Member> unfinished;  // the first set-up has failed
  };

  struct Session {
    std::unique_ptr<Bootstrap> bootstrap;
    std::map<Kind, Slot> slots;
  };

  struct Visit {
    const Request& request;
    Place place;
    Kind kind;
    std::shared_ptr<Group> group;    // null: there is none yet
    std::shared_ptr<Member> member;  // to be set up
    Member::Wish wish;
    Groups alive;  // What ends a group waits for its devices: not under the lock.
  };

  static constexpr size_t kRuns = 64;  // far more than are in Initialize at the same time

  std::optional<Result> look_up(Visit* visit, std::shared_ptr<const Member>* member);
  Run& run(int64_t id);
  void decide(Visit* visit, Run* run);
  Session& session(const Visit& visit);
  std::string obstacle(const Bootstrap& own);
  void settle(Visit* visit, const Result& result);
  void join(Visit* visit);

  std::mutex mutex_;
  std::map<Communicator, Session> sessions_;
  std::deque<Run> runs_;  // newest first
  std::vector<std::weak_ptr<Group>> groups_;
  Groups kept_;
};

}  // namespace megamoe::transport
