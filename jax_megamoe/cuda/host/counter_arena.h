// Device memory for the counters of call sites. They are small and there is a set for each call of a model, so that
// they share a few allocations: an allocation and a device-wide wait for each would empty the pipeline at every new
// program.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace megamoe {

// Of one device. Memory is never given back to the driver, which would wait for everything that runs.
class CounterArena {
 public:
  // The device by the CUDA runtime's number; it has to be the current one in `take`.
  static CounterArena& of_device(int device);

  // Zeroed memory, aligned to kAlignment bytes; waits for the zeroing, and for no work of others.
  cudaError_t take(size_t bytes, void** block);
  // What `take` has returned for so many bytes, once no launch uses it any more.
  void give_back(void* block, size_t bytes);

 private:
  static constexpr size_t kAlignment = 1024;
  static constexpr size_t kSlabBytes = 1 << 20;

  cudaError_t find(size_t bytes, void** block);

  std::mutex mutex_;
  cudaStream_t stream_ = nullptr;
  char* slab_ = nullptr;
  size_t left_ = 0;                             // of the newest slab
  std::multimap<size_t, void*> unused_blocks_;  // by size
};

}  // namespace megamoe
