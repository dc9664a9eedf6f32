#include "host/counter_arena.h"

#include <algorithm>

namespace megamoe {

namespace {

constexpr size_t round_up_to(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

}  // namespace

CounterArena& CounterArena::of_device(int device) {
  // Never destroyed: at process exit the driver may be gone already; the memory goes with the context then.
  static auto* mutex = new std::mutex();
  static auto* arenas = new std::map<int, std::unique_ptr<CounterArena>>();
  std::lock_guard<std::mutex> lock(*mutex);
  std::unique_ptr<CounterArena>& arena = (*arenas)[device];
  if (arena == nullptr) arena = std::make_unique<CounterArena>();
  return *arena;
}

cudaError_t CounterArena::take(size_t bytes, void** block) {
  bytes = round_up_to(bytes, kAlignment);
  std::lock_guard<std::mutex> lock(mutex_);
  cudaError_t error = find(bytes, block);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(*block, 0, bytes, stream_);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream_);
  if (error != cudaSuccess) unused_blocks_.emplace(bytes, *block);
  return error;
}

void CounterArena::give_back(void* block, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  unused_blocks_.emplace(round_up_to(bytes, kAlignment), block);
}

cudaError_t CounterArena::find(size_t bytes, void** block) {
  if (stream_ == nullptr) {
    const cudaError_t error = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    if (error != cudaSuccess) return error;
  }
  const auto unused = unused_blocks_.find(bytes);
  if (unused != unused_blocks_.end()) {
    *block = unused->second;
    unused_blocks_.erase(unused);
    return cudaSuccess;
  }
  if (bytes > left_) {
    const size_t slab_bytes = std::max(bytes, kSlabBytes);
    void* slab = nullptr;
    const cudaError_t error = cudaMalloc(&slab, slab_bytes);
    if (error != cudaSuccess) return error;
    slab_ = static_cast<char*>(slab);
    left_ = slab_bytes;
  }
  *block = slab_;
  slab_ += bytes;
  left_ -= bytes;
  return cudaSuccess;
}

}  // namespace megamoe
