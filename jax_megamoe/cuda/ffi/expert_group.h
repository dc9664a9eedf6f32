// What a call site of an expert-parallel handler keeps: for each device, its group's symmetric memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "ffi/communicator.h"
#include "transport/registry.h"

namespace megamoe {

// Member of an FFI instance state. The memory is shared with all call sites that ask for the same layout and size class, and
// is given back when the last of their executables is dropped (transport/registry.h says which is kept).
class ExpertGroup {
 public:
  // Initialize. Collective where there is no memory of that kind yet. Whatever else the handler allocates on the device
  // has to be there before: a rank that has left may already run a kernel that waits for this one.
  ffi::Error initialize(CollectivesContext& context, const ReplicaGroups& groups, int device, uint64_t bytes,
                        uint32_t layout, transport::Wanted wanted = transport::Wanted::kAny) {
    ffi::ErrorOr<void*> communicator = groups.get(context);
    if (communicator.has_error()) return std::move(communicator).error();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = members_.find(device);
      if (found != members_.end() && found->second.communicator == communicator.value()) return ffi::Error::Success();
    }
    Member member{communicator.value(), nullptr};
    transport::Request request{member.communicator, device, bytes, layout, wanted};
    const std::string failure = transport::acquire(request, &member.group);
    if (!failure.empty()) {
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                        "jax_megamoe: setting up the memory that the " + std::to_string(groups.size()) +
                            " ranks of the expert axis share failed: " + failure +
                            ". Where GPUs can't reach each other's memory, pass implementation=\"collective\".");
    }
    std::lock_guard<std::mutex> lock(mutex_);
    members_[device] = std::move(member);
    return ffi::Error::Success();
  }

  // Execute. Null before `initialize` on that device.
  const transport::SymmetricMemory* find(int device) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = members_.find(device);
    return found == members_.end() ? nullptr : found->second.group->on_device(device);
  }

 private:
  struct Member {
    void* communicator;
    std::shared_ptr<transport::SymmetricGroup> group;
  };

  mutable std::mutex mutex_;
  std::map<int, Member> members_;
};

}  // namespace megamoe
