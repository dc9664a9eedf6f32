// What a call site of an expert-parallel handler keeps: for each device, its group's symmetric memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "ffi/communicator.h"
#include "common/device_scope.h"
#include "transport/registry.h"

namespace megamoe {

// Member of an FFI instance state. The group is shared with all call sites that ask for the same layout, and goes with
// the last of their executables (transport/registry.h says which is kept).
class ExpertGroup {
 public:
  // Initialize. The device by the CUDA runtime's number, which XLA's ordinal need not be where a process was given some
  // of the GPUs only.
  static ffi::ErrorOr<int> cuda_device(CollectivesContext& context, const ReplicaGroups& groups) {
    ffi::ErrorOr<void*> communicator = groups.get(context);
    if (communicator.has_error()) return std::move(communicator).error();
    transport::Place place;
    const std::string failure = transport::place_of(communicator.value(), &place);
    if (!failure.empty()) return ffi::Error::Internal("jax_megamoe: " + failure + ".");
    return place.device;
  }

  // Initialize, in every run. An error where a wait has failed in an earlier run, once; collective where the group has
  // to be set up, and cheap otherwise. Whatever else the handler allocates on the device has to be there before: a rank
  // that has left may already run a kernel that waits for this one. `ordinal` is XLA's.
  ffi::Error initialize(CollectivesContext& context, const ReplicaGroups& groups, int ordinal, ffi::RunId run,
                        uint64_t bytes, const transport::Layout& layout, double setup_timeout_seconds,
                        transport::Wanted wanted = transport::Wanted::kAny) {
    ffi::ErrorOr<void*> communicator = groups.get(context);
    if (communicator.has_error()) return std::move(communicator).error();
    const transport::Request request{communicator.value(), bytes, run.run_id, &layout, wanted, setup_timeout_seconds};
    std::shared_ptr<const transport::Member> member;
    const transport::Result result = transport::Registry::get().enter(request, &member);
    switch (result.state) {
      case transport::State::kOk:
        break;
      case transport::State::kFailed:
        return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, "jax_megamoe.moe: " + result.text);
      case transport::State::kNotSetUp:
        return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                          "jax_megamoe: setting up the memory that the " + std::to_string(groups.size()) +
                              " ranks of the expert axis share failed: " + result.text + ".");
    }
    std::lock_guard<std::mutex> lock(mutex_);
    members_[ordinal].swap(member);  // what was there goes when the lock is free
    return ffi::Error::Success();
  }

  // Execute. Null before `initialize` on that device.
  const transport::Member* find(int ordinal) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = members_.find(ordinal);
    return found == members_.end() ? nullptr : found->second.get();
  }

 private:
  mutable std::mutex mutex_;
  std::map<int, std::shared_ptr<const transport::Member>> members_;  // by ordinal
};

}  // namespace megamoe
