// A machine without GPUs for the transport's tests: host memory for device memory, one thread for each rank.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace fakes {

struct Clique {
  std::mutex mutex;
  std::map<int, std::map<int, std::string>> contributions;  // by step, then rank
  int num_ranks = 0;
  bool has_memory = true;  // for what NCCL sets up in the first collective
};

struct Comm {
  Clique* clique = nullptr;
  int rank = 0, device = 0, step = 0;
  std::vector<void*>* windows = nullptr;  // by rank; null: no windows

  // Once it has come: the real registration returns when all ranks have.
  void* window_of(int peer) const {
    void* address = nullptr;
    while (address == nullptr) {
      std::lock_guard<std::mutex> lock(clique->mutex);
      address = (*windows)[peer];
    }
    return address;
  }
};

// A stream runs at once, but for an all-gather, which is over when all ranks have come to it.
struct Stream {
  int device = 0;
  Clique* clique = nullptr;
  int step = 0;
  char* received = nullptr;
};

// What the driver knows, and what it minds.
struct Driver {
  std::mutex mutex;
  std::map<void*, size_t> allocations;  // live ones
  std::map<void*, int> mappings;        // of an allocation by CUDA IPC
  std::set<Stream*> streams;
  std::set<CUcontext> contexts;               // that some thread has had; device d's is d + 1
  std::set<std::pair<int, int>> unreachable;  // (from, to)
  std::map<int, size_t> limits;               // bytes of one allocation, by device
  cudaError_t status = cudaSuccess;           // what choosing a device returns
  bool forbids_ipc = false;                   // of other processes' memory
  std::function<void(const std::string& function, int device)> on_call;
  std::vector<std::string> faults;  // what would hang or be undefined on a real machine

  int num_buffers();  // live allocations that are large
  size_t buffer_bytes();
};
Driver& driver();

inline thread_local int process = 0;  // that this thread plays
inline thread_local cudaError_t last_error = cudaSuccess;

}  // namespace fakes
