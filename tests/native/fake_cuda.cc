// The parts of the CUDA runtime that the transport calls.
#include <cstdlib>
#include <cstring>
#include <thread>

#include "fakes.h"

namespace fakes {

namespace {

thread_local int current_device = 0;       // the runtime's, which is 0 in a new thread
thread_local CUcontext context = nullptr;  // the driver's

CUresult get_context(CUcontext* current) { return *current = context, CUDA_SUCCESS; }
CUresult set_context(CUcontext wanted) { return context = wanted, CUDA_SUCCESS; }

bool is_pending(Stream& stream) {
  if (stream.clique == nullptr) return false;
  std::lock_guard<std::mutex> lock(stream.clique->mutex);
  const auto& ranks = stream.clique->contributions[stream.step];
  if (static_cast<int>(ranks.size()) < stream.clique->num_ranks) return true;
  char* out = stream.received;
  for (const auto& [rank, bytes] : ranks) {
    std::memcpy(out, bytes.data(), bytes.size());
    out += bytes.size();
  }
  stream.clique = nullptr;
  return false;
}

// The driver's mutex is held.
void wait_for_device(const char* who) {
  for (Stream* stream : driver().streams) {
    if (stream->device == current_device && is_pending(*stream)) {
      driver().faults.push_back(std::string(who) + " waits for a rank that has not come");
    }
  }
}

void tell(const char* function) {
  std::function<void(const std::string&, int)> on_call;
  {
    std::lock_guard<std::mutex> lock(driver().mutex);
    on_call = driver().on_call;
  }
  if (on_call) on_call(function, current_device);
}

}  // namespace

Driver& driver() {
  static Driver* driver = new Driver();
  return *driver;
}

int Driver::num_buffers() {
  std::lock_guard<std::mutex> lock(mutex);
  int count = 0;
  for (const auto& [address, bytes] : allocations) count += bytes >= (1 << 20);
  return count;
}

size_t Driver::buffer_bytes() {
  std::lock_guard<std::mutex> lock(mutex);
  size_t sum = 0;
  for (const auto& [address, bytes] : allocations) sum += bytes >= (1 << 20) ? bytes : 0;
  return sum;
}

}  // namespace fakes

using fakes::driver;

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  const intptr_t of_context = reinterpret_cast<intptr_t>(fakes::context) - 1;
  return *device = of_context < 0 ? fakes::current_device : static_cast<int>(of_context), cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (driver().status != cudaSuccess) return fakes::last_error = driver().status;
  fakes::current_device = device;
  fakes::context = reinterpret_cast<CUcontext>(static_cast<intptr_t>(device) + 1);
  std::lock_guard<std::mutex> lock(driver().mutex);
  driver().contexts.insert(fakes::context);
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool sets = std::strcmp(name, "cuCtxSetCurrent") == 0;
  *function = sets ? reinterpret_cast<void*>(fakes::set_context) : reinterpret_cast<void*>(fakes::get_context);
  return *found = cudaDriverEntryPointSuccess, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return std::exchange(fakes::last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return "a fake error"; }

cudaError_t cudaDeviceSynchronize() {
  fakes::tell("cudaDeviceSynchronize");
  std::lock_guard<std::mutex> lock(driver().mutex);
  fakes::wait_for_device("cudaDeviceSynchronize");
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** result, size_t bytes) {
  fakes::tell("cudaMalloc");
  std::lock_guard<std::mutex> lock(driver().mutex);
  const auto limit = driver().limits.find(fakes::current_device);
  if (limit != driver().limits.end() && bytes > limit->second) {
    return fakes::last_error = cudaErrorMemoryAllocation;
  }
  *result = std::malloc(bytes);
  std::memset(*result, 0xa5, bytes);
  driver().allocations[*result] = bytes;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  std::lock_guard<std::mutex> lock(driver().mutex);
  const auto limit = driver().limits.find(fakes::current_device);
  *total = size_t{1} << 40;
  *free = limit != driver().limits.end() ? limit->second : *total;
  return cudaSuccess;
}

cudaError_t cudaFree(void* buffer) {
  if (buffer == nullptr) return cudaSuccess;
  std::lock_guard<std::mutex> lock(driver().mutex);
  fakes::wait_for_device("cudaFree");
  if (driver().allocations.erase(buffer) == 0) driver().faults.push_back("freed twice");
  if (driver().mappings[buffer] != 0) driver().faults.push_back("freed while another process has it mapped");
  std::free(buffer);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** result, size_t bytes, unsigned) { return cudaMalloc(result, bytes); }
cudaError_t cudaFreeHost(void* buffer) { return cudaFree(buffer); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* result, unsigned) {
  std::lock_guard<std::mutex> lock(driver().mutex);
  auto* stream = new fakes::Stream();
  stream->device = fakes::current_device;
  driver().streams.insert(stream);
  *result = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  std::lock_guard<std::mutex> lock(driver().mutex);
  if (!fakes::is_pending(*reinterpret_cast<fakes::Stream*>(handle))) return cudaSuccess;
  return fakes::last_error = cudaErrorNotReady;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  while (cudaStreamQuery(stream) == cudaErrorNotReady) std::this_thread::yield();
  cudaGetLastError();
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  fakes::tell("cudaMemsetAsync");
  // Where no memory is, buffers of the handlers' tests are.
  if (reinterpret_cast<uintptr_t>(to) >> 56 == 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* possible, int from, int to) {
  std::lock_guard<std::mutex> lock(driver().mutex);
  return *possible = driver().unreachable.count({from, to}) == 0, cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaErrorPeerAccessAlreadyEnabled; }

// A mapping has the address of what is mapped.
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* buffer) {
  return std::memcpy(handle, &buffer, sizeof(buffer)), cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void** result, cudaIpcMemHandle_t handle, unsigned) {
  fakes::tell("cudaIpcOpenMemHandle");
  std::memcpy(result, &handle, sizeof(*result));
  std::lock_guard<std::mutex> lock(driver().mutex);
  if (driver().forbids_ipc) return fakes::last_error = cudaErrorNotPermitted;
  if (driver().allocations.count(*result) == 0) return cudaErrorInvalidValue;
  ++driver().mappings[*result];
  return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void* mapping) {
  std::lock_guard<std::mutex> lock(driver().mutex);
  return --driver().mappings[mapping], cudaSuccess;
}
}
