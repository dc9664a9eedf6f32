#include "transport/registry.h"

#include <array>
#include <cstring>
#include <tuple>

namespace megamoe::transport {

SymmetricGroup::~SymmetricGroup() {
  // A rank's kernel may still write into another's buffer.
  for (const auto& [device, memory] : members_) {
    DeviceScope scope(device);
    if (scope.status() == cudaSuccess) cudaDeviceSynchronize();
  }
  members_.clear();
}

const SymmetricMemory* SymmetricGroup::on_device(int device) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = members_.find(device);
  return found == members_.end() ? nullptr : found->second.get();
}

class Registry {
 public:
  // Never destroyed: at process exit the driver may be gone before this would be.
  static Registry& get() {
    static Registry* registry = new Registry();
    return *registry;
  }

  std::string acquire(Request request, std::shared_ptr<SymmetricGroup>* group) {
    request.bytes = size_class(request.bytes);
    const Key key{request.communicator, request.device, request.bytes, request.layout, request.wanted};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = by_key_.find(key);
      if (found != by_key_.end() && (*group = found->second.lock()) != nullptr) return {};
    }
    // Not under the lock: it waits for the other ranks, which may be threads of this process.
    std::unique_ptr<SymmetricMemory> memory;
    const std::string failure = SymmetricMemory::create(request, &memory);
    if (!failure.empty()) return failure;
    std::lock_guard<std::mutex> lock(mutex_);
    std::weak_ptr<SymmetricGroup>& shared = by_token_[{memory->group()[0], memory->group()[1]}];
    *group = shared.lock();
    if (*group == nullptr) shared = *group = std::make_shared<SymmetricGroup>();
    by_key_[key] = *group;
    if (memory->spans_processes() || std::strcmp(memory->transport(), "NCCL window") == 0) kept_.push_back(*group);
    std::lock_guard<std::mutex> members_lock((*group)->mutex_);
    (*group)->members_[request.device] = std::move(memory);
    return {};
  }

  std::vector<Description> describe_all() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Description> all;
    for (const auto& [token, weak] : by_token_) {
      const std::shared_ptr<SymmetricGroup> group = weak.lock();
      if (group == nullptr) continue;
      std::lock_guard<std::mutex> members_lock(group->mutex_);
      for (const auto& [device, memory] : group->members_) {
        all.push_back({device, memory->rank(), memory->num_ranks(), memory->bytes(), memory->transport(),
                       memory->spans_processes(), memory->failure()});
      }
    }
    return all;
  }

 private:
  using Key = std::tuple<Communicator, int, uint64_t, uint32_t, Wanted>;

  std::mutex mutex_;
  std::map<Key, std::weak_ptr<SymmetricGroup>> by_key_;
  std::map<std::array<uint64_t, 2>, std::weak_ptr<SymmetricGroup>> by_token_;
  std::vector<std::shared_ptr<SymmetricGroup>> kept_;
};

std::string acquire(const Request& request, std::shared_ptr<SymmetricGroup>* group) {
  return Registry::get().acquire(request, group);
}

std::vector<Description> describe_all() { return Registry::get().describe_all(); }

}  // namespace megamoe::transport
