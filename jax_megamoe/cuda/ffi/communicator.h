// XLA as the process group: the communicator of a call's replica group, through the FFI's Collectives extension.
//
// A handler binds `.Ctx<Collectives>()` and `.Attrs()` for `ReplicaGroups`, requests the communicator in Prepare (XLA
// creates it there, once per process and group) and gets it in Initialize, where it may be used: all ranks of a group
// are in Initialize at the same time then, one host thread each.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "xla/ffi/api/collectives_api.h"
#include "xla/ffi/api/ffi.h"

namespace megamoe {

namespace ffi = xla::ffi;

// One communicator for all calls over a group, apart from those of XLA's own collectives (ids 0 and 1): what is
// enqueued on it in Initialize never meets a collective of a program. `COMMUNICATION_ID` in primitives/_groups.py.
constexpr int64_t kCommunicationId = 0x6d6f65;

struct CollectivesContext : ffi::internal::CommunicatorContextBase<ffi::internal::ErrorPolicy> {
  using CommunicatorContextBase::CommunicatorContextBase;
  std::string obstacle;  // why there is no communicator to be had, or nothing
};

struct CollectivesExtension : ffi::internal::CollectivesExtensionBase<CollectivesContext> {
  // The two calls used here and their arguments are the same in 0.1 (jaxlib 0.11.2) and 0.2 (0.12), which appends
  // others. The default would ask for the very version of the headers that this was compiled with.
  static bool Support(int32_t major, int32_t minor) { return major == 0 && (minor == 1 || minor == 2); }
};

// What handlers bind: the extension, or the reason why this XLA has none that serves, for an error of our own.
struct Collectives {};

}  // namespace megamoe

template <>
struct xla::ffi::CtxDecoding<megamoe::Collectives> {
  using Type = megamoe::CollectivesContext;

  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_InvokeContext* context, DiagnosticEngine&) {
    DiagnosticEngine reason;
    auto found = CtxDecoding<Extension<megamoe::CollectivesExtension>>::Decode(api, context, reason);
    if (found.has_value()) return found;
    Type missing(api, nullptr);
    missing.obstacle =
        "this jaxlib's XLA does not offer the communicators of collectives as versions 0.1 and 0.2 of its "
        "extension do (" +
        reason.Result() + "); install jaxlib 0.11.2 to 0.12, or pass implementation=\"collective\"";
    return missing;
  }
};

namespace megamoe {

// All groups of a program, equal in size, ids being positions in its device assignment ("flattened" ids).
class ReplicaGroups {
 public:
  // From the attributes `replica_groups` int64[num_groups * group_size] and `group_size` int64. The dictionary, since a
  // stage that binds attributes by name has to bind all that the call has.
  static ffi::ErrorOr<ReplicaGroups> parse(const ffi::Dictionary& attributes) {
    const auto listed = attributes.get<ffi::Span<const int64_t>>("replica_groups");
    const auto size = attributes.get<int64_t>("group_size");
    if (listed.has_error() || size.has_error()) {
      return ffi::Error::InvalidArgument("jax_megamoe: the call lacks the attributes replica_groups and group_size.");
    }
    const ffi::Span<const int64_t> ids = listed.value();
    const int64_t group_size = size.value();
    if (group_size < 1 || ids.size() == 0 || ids.size() % static_cast<size_t>(group_size) != 0) {
      return ffi::Error::InvalidArgument("jax_megamoe: replica_groups has " + std::to_string(ids.size()) +
                                         " ids and group_size is " + std::to_string(group_size) +
                                         "; wanted a positive multiple of a positive size.");
    }
    // What NCCL would make of a device that is in a group twice, nobody promises: it may wait for ever.
    const std::set<int64_t> devices(ids.begin(), ids.end());
    if (devices.size() != ids.size() || *devices.begin() < 0) {
      return ffi::Error::InvalidArgument(
          "jax_megamoe: replica_groups has an id twice, or a negative one; wanted each device once.");
    }
    ReplicaGroups parsed;
    for (size_t i = 0; i < ids.size(); i += group_size) {
      parsed.groups_.emplace_back(ids.begin() + i, ids.begin() + i + group_size);
    }
    return parsed;
  }

  int size() const { return static_cast<int>(groups_.front().size()); }

  // Prepare only.
  ffi::Error request(CollectivesContext& context) const {
    if (!context.obstacle.empty()) return no_communicator(context);
    return context.RequestCommunicator(ffi::GroupMode::kFlattenedId, groups_, kCommunicationId);
  }

  // Initialize and Execute: this device's ncclComm_t, owned by XLA. Its rank is the device's place in its group.
  ffi::ErrorOr<void*> get(CollectivesContext& context) const {
    if (!context.obstacle.empty()) return ffi::Unexpected(no_communicator(context));
    auto communicator = context.GetCommunicator(ffi::GroupMode::kFlattenedId, groups_, kCommunicationId);
    if (communicator.has_error()) return std::move(communicator).error();
    return static_cast<void*>(communicator.value());
  }

 private:
  static ffi::Error no_communicator(const CollectivesContext& context) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "jax_megamoe: " + context.obstacle + ".");
  }

  std::vector<std::vector<int64_t>> groups_;
};

// The Prepare stage of a handler that uses the communicator of its call's group.
inline ffi::Error request_communicator(CollectivesContext context, ffi::Dictionary attributes) {
  ffi::ErrorOr<ReplicaGroups> groups = ReplicaGroups::parse(attributes);
  if (groups.has_error()) return std::move(groups).error();
  return groups.value().request(context);
}

}  // namespace megamoe
