#include "transport/nccl_api.h"

#include <dlfcn.h>

#include <chrono>
#include <thread>

namespace megamoe::transport {

namespace {

// What NCCL takes of a device when a communicator is first used, generously.
constexpr size_t kSetUpBytes = size_t{1} << 30;

template <typename Function>
bool find(void* library, const char* name, Function** function) {
  *function = reinterpret_cast<Function*>(dlsym(library, name));
  return *function != nullptr;
}

struct Loaded {
  NcclApi api = {};
  std::string reason;

  Loaded() {
    // Only what is loaded already: another copy of the library would not know XLA's communicators.
    void* library = dlopen("libnccl.so.2", RTLD_NOLOAD | RTLD_NOW);
    if (library == nullptr) {
      reason = "libnccl.so.2 is not loaded in this process; JAX's CUDA plugin loads it";
      return;
    }
    const bool complete =
        find(library, "ncclGetErrorString", &api.error_string) && find(library, "ncclGetVersion", &api.version) &&
        find(library, "ncclCommUserRank", &api.rank) && find(library, "ncclCommCount", &api.num_ranks) &&
        find(library, "ncclCommCuDevice", &api.device) && find(library, "ncclCommGetAsyncError", &api.async_error) &&
        find(library, "ncclAllGather", &api.all_gather);
    if (!complete) {
      reason = "libnccl.so.2 lacks a function that every version since 2.14 has";
      return;
    }
    find(library, "ncclGetLastError", &api.last_error);
    find(library, "ncclMemAlloc", &api.allocate);
    find(library, "ncclMemFree", &api.release);
    find(library, "ncclCommWindowRegister", &api.register_window);
    find(library, "ncclCommWindowDeregister", &api.deregister_window);
    find(library, "ncclTeamLsa", &api.team_of_shared_memory);
    find(library, "ncclGetLsaDevicePointer", &api.peer_pointer);
  }
};

}  // namespace

const NcclApi* nccl_api(std::string* reason) {
  static const Loaded loaded;
  if (loaded.reason.empty()) return &loaded.api;
  *reason = loaded.reason;
  return nullptr;
}

std::string place_of(Communicator communicator, Place* place) {
  std::string reason;
  const NcclApi* nccl = nccl_api(&reason);
  if (nccl == nullptr) return reason;
  int result = nccl->rank(communicator, &place->rank);
  if (result == NcclApi::kSuccess) result = nccl->num_ranks(communicator, &place->num_ranks);
  if (result == NcclApi::kSuccess) result = nccl->device(communicator, &place->device);
  return result == NcclApi::kSuccess ? std::string() : nccl->failure("asking XLA's communicator for its ranks", result);
}

std::string NcclApi::failure(const std::string& what, int result) const {
  std::string text = what + " failed: " + error_string(result);
  const char* last = last_error != nullptr ? last_error(nullptr) : nullptr;
  if (last != nullptr && *last != '\0') text += std::string(" (") + last + ")";
  // NCCL sets a communicator up in its first collective, and says no more than this where there is no room for it.
  size_t free = 0, total = 0;
  if (result == kUnhandledCudaError && cudaMemGetInfo(&free, &total) == cudaSuccess && free < kSetUpBytes) {
    text +=
        "; the device has " + std::to_string(free >> 20) +
        " MiB of memory left: leave room for NCCL beside JAX's own pool with a smaller XLA_PYTHON_CLIENT_MEM_FRACTION";
  }
  return text;
}

std::string NcclApi::settle(Communicator communicator, int result, const char* what, double seconds) const {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (result == kInProgress) {
    if (std::chrono::steady_clock::now() > deadline) return std::string(what) + " did not come to an end";
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    int state = kSuccess;
    const int asked = async_error(communicator, &state);
    result = asked != kSuccess ? asked : state;
  }
  return result == kSuccess ? std::string() : failure(what, result);
}

}  // namespace megamoe::transport
