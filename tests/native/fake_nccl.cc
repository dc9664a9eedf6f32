// Stands for libnccl.so.2 in the transport's test. FAKE_NCCL_VERSION: of another one, which tells peers' pointers to
// device code only.
#include <cstdlib>
#include <cstring>

#include "fakes.h"

using fakes::Comm;
using fakes::Stream;

extern "C" {

struct Team {
  int num_ranks, rank, stride;
};

const char* ncclGetErrorString(int) { return "a fake error"; }
const char* ncclGetLastError(Comm*) { return "what NCCL said last"; }
#ifdef FAKE_NCCL_VERSION
int ncclGetVersion(int* version) { return *version = FAKE_NCCL_VERSION, 0; }
#else
int ncclGetVersion(int* version) { return *version = 22809, 0; }
#endif
int ncclCommUserRank(Comm* comm, int* rank) { return *rank = comm->rank, 0; }
int ncclCommCount(Comm* comm, int* count) { return *count = comm->clique->num_ranks, 0; }
int ncclCommCuDevice(Comm* comm, int* device) { return *device = comm->device, 0; }
int ncclCommGetAsyncError(Comm*, int* state) { return *state = 0, 0; }

int ncclAllGather(const void* sent, void* received, size_t bytes, int, Comm* comm, Stream* stream) {
  std::lock_guard<std::mutex> lock(comm->clique->mutex);
  if (!comm->clique->has_memory) return 1;  // an unhandled CUDA error
  stream->clique = comm->clique;
  stream->step = comm->step++;
  stream->received = static_cast<char*>(received);
  comm->clique->contributions[stream->step][comm->rank] = std::string(static_cast<const char*>(sent), bytes);
  return 7;  // in progress, as in the non-blocking mode
}

int ncclMemAlloc(void** result, size_t bytes) { return *result = std::malloc(bytes), 0; }
int ncclMemFree(void* buffer) { return std::free(buffer), 0; }

int ncclCommWindowRegister(Comm* comm, void* buffer, size_t, void** window, int) {
  std::lock_guard<std::mutex> lock(comm->clique->mutex);
  *window = nullptr;
  if (comm->windows == nullptr) return 0;
  (*comm->windows)[comm->rank] = buffer;
  *window = comm;
  return 0;
}

int ncclCommWindowDeregister(Comm* comm, void*) {
  std::lock_guard<std::mutex> lock(comm->clique->mutex);
  (*comm->windows)[comm->rank] = nullptr;
  return 0;
}

Team ncclTeamLsa(Comm* comm) { return {comm->clique->num_ranks, comm->rank, 1}; }

#ifndef FAKE_NCCL_VERSION
int ncclGetLsaDevicePointer(void* window, size_t offset, int peer, void** result) {
  return *result = static_cast<char*>(static_cast<Comm*>(window)->window_of(peer)) + offset, 0;
}
#endif
}
