// The few functions of NCCL that the set-up needs, found in the library that JAX has loaded: nothing links NCCL, and no
// header of it is needed. The declarations below are NCCL's stable host ABI.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

namespace megamoe::transport {

using Communicator = void*;  // ncclComm_t
using Window = void*;        // ncclWindow_t, a device pointer

struct NcclTeam {
  int num_ranks, rank, stride;
};

struct NcclApi {
  static constexpr int kSuccess = 0;
  static constexpr int kUnhandledCudaError = 1;
  static constexpr int kInProgress = 7;
  static constexpr int kUint8 = 1;
  static constexpr int kCollectiveSymmetricWindow = 1;

  const char* (*error_string)(int);
  int (*version)(int*);
  int (*rank)(Communicator, int*);
  int (*num_ranks)(Communicator, int*);
  int (*device)(Communicator, int*);
  int (*async_error)(Communicator, int*);
  int (*all_gather)(const void*, void*, size_t, int, Communicator, cudaStream_t);
  // The rest is null in a library that is too old for it.
  const char* (*last_error)(Communicator);  // of any communicator
  int (*allocate)(void**, size_t);
  int (*release)(void*);
  int (*register_window)(Communicator, void*, size_t, Window*, int);
  int (*deregister_window)(Communicator, Window);
  NcclTeam (*team_of_shared_memory)(Communicator);                      // from 2.28
  int (*peer_pointer)(Window, size_t offset, int peer, void** result);  // ncclGetLsaDevicePointer, after 2.28

  // The sentence of a call that failed: what NCCL says of it, and what to do where the current device has no memory left.
  std::string failure(const std::string& what, int result) const;

  // Waits until the last call on the communicator has been carried out, which in NCCL's non-blocking mode may be later
  // than it returned. Returns what is wrong, or nothing.
  std::string settle(Communicator communicator, int result, const char* what, double seconds) const;
};

// What a communicator says of itself.
struct Place {
  int rank = 0, num_ranks = 0;
  int device = 0;  // CUDA's number of it

  bool operator==(const Place& other) const {
    return rank == other.rank && num_ranks == other.num_ranks && device == other.device;
  }
};

// Returns what is wrong, or nothing. Asks memory of the host only.
std::string place_of(Communicator communicator, Place* place);

// The library's functions, or null, with the reason, where this process has not loaded NCCL.
const NcclApi* nccl_api(std::string* reason);

}  // namespace megamoe::transport
