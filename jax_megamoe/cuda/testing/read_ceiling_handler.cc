// XLA FFI handler of the read ceiling: buffer of bytes in, one unused word out.
#include <cuda_runtime_api.h>

#include <string>

#include "testing/read_ceiling.h"
#include "testing/targets.h"
#include "xla/ffi/api/ffi.h"

namespace megamoe {

namespace {

constexpr int64_t kGranularity = 32 * 1024;

ffi::Error execute_read_ceiling(cudaStream_t stream, int32_t device, ffi::AnyBuffer buffer,
                                ffi::Result<ffi::AnyBuffer> sink, int64_t start, int64_t bytes) {
  const int64_t total = static_cast<int64_t>(buffer.size_bytes()) / kGranularity * kGranularity;
  if (total == 0 || start < 0 || bytes < 1) {
    return ffi::Error::InvalidArgument("jax_megamoe.read_ceiling: the buffer has " +
                                       std::to_string(buffer.size_bytes()) + " bytes, start is " +
                                       std::to_string(start) + " and bytes is " + std::to_string(bytes) +
                                       "; wanted a buffer of at least 32768 bytes, start >= 0 and bytes >= 1.");
  }
  if (sink->size_bytes() < sizeof(uint32_t)) {
    return ffi::Error::InvalidArgument("jax_megamoe.read_ceiling: the result has to hold one uint32.");
  }
  int ctas = 0;
  cudaError_t error = cudaDeviceGetAttribute(&ctas, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = launch_read_ceiling(static_cast<const uint8_t*>(buffer.untyped_data()), total, start, bytes,
                                static_cast<uint32_t*>(sink->untyped_data()), ctas, stream);
  }
  if (error != cudaSuccess) {
    return ffi::Error::Internal(std::string("jax_megamoe.read_ceiling: ") + cudaGetErrorString(error));
  }
  return ffi::Error::Success();
}

}  // namespace

Target read_ceiling_target() {
  XLA_FFI_DEFINE_HANDLER(kExecute, execute_read_ceiling,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::PlatformStream<cudaStream_t>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .Arg<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Attr<int64_t>("start")
                             .Attr<int64_t>("bytes"),
                         {ffi::Traits::kCmdBufferCompatible});
  return {"jax_megamoe.read_ceiling.v1", {{"execute", kExecute}}};
}

}  // namespace megamoe
