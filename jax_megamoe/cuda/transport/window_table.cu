#include "transport/window_table.h"

#include "common/device_scope.h"

#ifdef MEGAMOE_NCCL_HEADERS
#include "nccl_device.h"
#endif

namespace megamoe::transport {

#ifdef MEGAMOE_NCCL_HEADERS

namespace {

__global__ void read_window(ncclWindow_t window, int num_ranks, void** peers) {
  const int peer = threadIdx.x;
  if (peer < num_ranks) peers[peer] = ncclGetLsaPointer(window, 0, peer);
}

}  // namespace

bool can_read_window_table(int nccl_version) {
  // The layout of a window belongs to a minor version of NCCL.
  return nccl_version / 100 == NCCL_VERSION_CODE / 100;
}

std::string read_window_table(Window window, cudaStream_t stream, std::vector<void*>* peers) {
  const int num_ranks = static_cast<int>(peers->size());
  const size_t bytes = num_ranks * sizeof(void*);
  void** table = nullptr;
  cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&table), bytes);
  if (error == cudaSuccess) {
    read_window<<<1, num_ranks, 0, stream>>>(static_cast<ncclWindow_t>(window), num_ranks, table);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) error = cudaMemcpyAsync(peers->data(), table, bytes, cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaFree(table);
  return error == cudaSuccess ? std::string() : cuda_failure("reading peers' pointers from the window", error);
}

#else

bool can_read_window_table(int) { return false; }

std::string read_window_table(Window, cudaStream_t, std::vector<void*>*) {
  return "this build has no NCCL device headers";
}

#endif

}  // namespace megamoe::transport
