#include "transport/registry.h"

#include <algorithm>
#include <utility>

#include "common/device_scope.h"

namespace megamoe::transport {

Registry& Registry::get() {
  static Registry* registry = new Registry();
  return *registry;
}

Registry::Group::~Group() {
  for (const auto& [device, member] : members) {
    if (!member->bootstrap().is_stuck()) continue;
    // Freeing anything would wait for a rank that never came.
    new auto(std::move(members));
    return;
  }
  // A rank's kernel may still write into another's buffer.
  for (const auto& [device, member] : members) {
    DeviceScope scope(device);
    if (scope.status() == cudaSuccess) cudaDeviceSynchronize();
  }
}

Result Registry::enter(const Request& request, std::shared_ptr<const Member>* member) {
  Visit visit = {request, {}, {}, {}, {}, {}, {}};
  const std::string failure = place_of(request.communicator, &visit.place);
  if (!failure.empty()) return {State::kNotSetUp, failure};
  visit.kind = {request.layout->id, request.wanted};
  if (const auto result = look_up(&visit, member)) return *result;

  // Not under the registry's lock: it waits for the other ranks, which may be threads of this process.
  std::unique_lock<std::mutex> lock(mutex_);
  Bootstrap& bootstrap = *session(visit).bootstrap;
  lock.unlock();
  std::lock_guard<std::mutex> one_at_a_time(bootstrap.mutex());
  // Another thread may have been quicker.
  if (const auto result = look_up(&visit, member)) return *result;
  const Result result = visit.member->rebuild(visit.wish);
  settle(&visit, result);
  if (result.state == State::kOk) *member = std::shared_ptr<const Member>(visit.group, visit.member.get());
  return result;
}

// The answer, where it needs no set-up.
std::optional<Result> Registry::look_up(Visit* visit, std::shared_ptr<const Member>* member) {
  const Request& request = visit->request;
  std::lock_guard<std::mutex> lock(mutex_);
  Session& session = this->session(*visit);
  Slot& slot = session.slots[visit->kind];
  visit->group = slot.group.lock();
  Run& run = this->run(request.run_id);
  decide(visit, &run);
  if (!run.failure.empty()) return Result{State::kFailed, run.failure};
  if (visit->group == nullptr) {
    if (slot.unfinished == nullptr) {
      slot.unfinished = std::make_shared<Member>(*session.bootstrap, *request.layout, request.wanted);
    }
    visit->member = slot.unfinished;
  } else {
    visit->member = visit->group->members[visit->place.device];
    const Member& found = *visit->member;
    const auto& anew = run.generations;
    if (found.is_ready() && found.bytes() >= request.bytes &&
        std::find(anew.begin(), anew.end(), found.generation()) == anew.end()) {
      *member = std::shared_ptr<const Member>(visit->group, &found);
      return Result{State::kOk, {}};
    }
  }
  visit->wish = {request.bytes, visit->group != nullptr && visit->group->is_told, obstacle(*session.bootstrap),
                 request.timeout_seconds};
  return std::nullopt;
}

Registry::Run& Registry::run(int64_t id) {
  for (Run& run : runs_) {
    if (run.id == id) return run;
  }
  runs_.push_front({id, 0, {}, {}});
  if (runs_.size() > kRuns) runs_.pop_back();
  return runs_.front();
}

// What the run finds of the visitor's cohort, when the first of it comes.
void Registry::decide(Visit* visit, Run* run) {
  if (visit->group == nullptr || visit->group->cohort == run->cohort) return;
  const uint64_t newcomers = visit->group->cohort;
  const bool is_first = run->cohort == 0;
  if (is_first) run->cohort = newcomers;
  for (const std::weak_ptr<Group>& weak : groups_) {
    const std::shared_ptr<Group> group = weak.lock();
    if (group == nullptr) continue;
    visit->alive.push_back(group);
    if (group->cohort != newcomers) continue;
    // Where others went on already, a failure that was not known has to wait for the next run.
    std::string failure;
    for (const auto& [device, member] : group->members) {
      if (is_first && !group->is_told && failure.empty()) failure = member->failure();
    }
    if (!failure.empty()) {
      run->failure += (run->failure.empty() ? "" : "; ") + failure;
      group->is_told = true;
    } else if (group->is_told || group->is_pending) {
      run->generations.push_back(group->generation);
    }
    group->cohort = run->cohort;
  }
  for (Run& other : runs_) {
    if (other.cohort == newcomers) other.cohort = run->cohort;
  }
}

Registry::Session& Registry::session(const Visit& visit) {
  Session& session = sessions_[visit.request.communicator];
  if (session.bootstrap == nullptr || !(session.bootstrap->place() == visit.place)) {
    // Another communicator at the address of one that is gone. What belonged to that one, nobody can give back with the
    // other ranks: it stays.
    if (session.bootstrap != nullptr) new Session(std::move(session));
    session = {std::make_unique<Bootstrap>(visit.request.communicator, visit.place), {}};
  }
  return session;
}

// What another group on the same device leaves no way around.
std::string Registry::obstacle(const Bootstrap& own) {
  for (const auto& [communicator, session] : sessions_) {
    const Bootstrap& other = *session.bootstrap;
    if (&other != &own && other.device() == own.device() && other.is_stuck()) {
      return "device " + std::to_string(own.device()) + " still waits for a rank of another group, of " +
             std::to_string(other.num_ranks()) + " ranks, that did not come to the set-up";
    }
  }
  return {};
}

void Registry::settle(Visit* visit, const Result& result) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (result.state == State::kOk && visit->group == nullptr) join(visit);
  Group* const group = visit->group.get();
  if (group == nullptr) return;
  if (result.state == State::kFailed) {
    group->is_told = true;
  } else if (result.state == State::kNotSetUp) {
    group->is_pending = true;
  } else if (group->generation != visit->member->generation()) {
    // The first of this process's ranks; what comes after it is no part of this set-up.
    group->generation = visit->member->generation();
    group->is_told = group->is_pending = false;
  }
  const bool is_kept = std::find(kept_.begin(), kept_.end(), visit->group) != kept_.end();
  if (visit->member->is_kept() && !is_kept) kept_.push_back(visit->group);
}

// The first set-up has succeeded: the ranks of the process find each other by the name that the group was given in it.
void Registry::join(Visit* visit) {
  const uint64_t name = visit->member->group();
  for (auto weak = groups_.begin(); weak != groups_.end();) {
    std::shared_ptr<Group> group = weak->lock();
    weak = group == nullptr ? groups_.erase(weak) : weak + 1;
    if (group == nullptr) continue;
    if (group->name == name) visit->group = group;
    visit->alive.push_back(std::move(group));
  }
  if (visit->group == nullptr) {
    visit->group = std::make_shared<Group>();
    visit->group->name = visit->group->cohort = name;
    groups_.push_back(visit->group);
  }
  visit->group->members[visit->place.device] = visit->member;
  Slot& slot = session(*visit).slots[visit->kind];
  slot.group = visit->group;
  slot.unfinished.reset();
  decide(visit, &run(visit->request.run_id));
}

std::vector<Description> Registry::describe_all() {
  Groups alive;
  std::vector<Description> all;
  std::lock_guard<std::mutex> lock(mutex_);
  for (const std::weak_ptr<Group>& weak : groups_) {
    const std::shared_ptr<Group> group = weak.lock();
    if (group == nullptr) continue;
    alive.push_back(group);
    for (const auto& [device, member] : group->members) {
      all.push_back({device, member->rank(), member->num_ranks(), member->bytes(), member->transport(),
                     member->spans_processes(), member->failure()});
    }
  }
  return all;
}

}  // namespace megamoe::transport
