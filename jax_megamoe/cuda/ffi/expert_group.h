// What a call site of an expert-parallel handler keeps: for each device, its group's symmetric memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "ffi/communicator.h"
#include "transport/registry.h"

namespace megamoe {

// Member of an FFI instance state. The memory is shared with all call sites that ask for the same layout and size class, and
// is given back when the last of their executables is dropped (transport/registry.h says which is kept).
class ExpertGroup {
 public:
  // Initialize. The device by the CUDA runtime's number, which XLA's ordinal need not be where a process was given some of
  // the GPUs only.
  static ffi::ErrorOr<int> cuda_device(CollectivesContext& context, const ReplicaGroups& groups) {
    ffi::ErrorOr<void*> communicator = groups.get(context);
    if (communicator.has_error()) return std::move(communicator).error();
    int device = 0;
    const std::string failure = transport::device_of(communicator.value(), &device);
    if (!failure.empty()) return ffi::Error::Internal("jax_megamoe: " + failure + ".");
    return device;
  }

  // Initialize. Collective where there is no memory of that kind yet. Whatever else the handler allocates on the device
  // has to be there before: a rank that has left may already run a kernel that waits for this one.
  // `ordinal` is XLA's.
  ffi::Error initialize(CollectivesContext& context, const ReplicaGroups& groups, int ordinal, uint64_t bytes,
                        uint32_t layout, transport::ReadNote read_note,
                        transport::Wanted wanted = transport::Wanted::kAny) {
    ffi::ErrorOr<void*> communicator = groups.get(context);
    if (communicator.has_error()) return std::move(communicator).error();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = members_.find(ordinal);
      if (found != members_.end() && found->second.communicator == communicator.value()) return ffi::Error::Success();
    }
    ffi::ErrorOr<int> device = cuda_device(context, groups);
    if (device.has_error()) return std::move(device).error();
    Member member{communicator.value(), device.value(), nullptr};
    transport::Request request{member.communicator, member.device, bytes, layout, read_note, wanted};
    const std::string failure = transport::acquire(request, &member.group);
    if (!failure.empty()) {
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                        "jax_megamoe: setting up the memory that the " + std::to_string(groups.size()) +
                            " ranks of the expert axis share failed: " + failure +
                            ". Where GPUs can't reach each other's memory, pass implementation=\"collective\".");
    }
    std::lock_guard<std::mutex> lock(mutex_);
    members_[ordinal] = std::move(member);
    return ffi::Error::Success();
  }

  // Execute. Null before `initialize` on that device.
  const transport::SymmetricMemory* find(int ordinal) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = members_.find(ordinal);
    return found == members_.end() ? nullptr : found->second.group->on_device(found->second.device);
  }

 private:
  struct Member {
    void* communicator;
    int device;
    std::shared_ptr<transport::SymmetricGroup> group;
  };

  mutable std::mutex mutex_;
  std::map<int, Member> members_;  // by ordinal
};

}  // namespace megamoe
