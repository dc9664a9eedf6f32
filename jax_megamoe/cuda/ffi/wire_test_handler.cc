// XLA FFI handlers of the wire test: the expert-parallel set-up from the communicator to the launch, without the layer.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "diagnostics/wire_test.h"
#include "ffi/attributes.h"
#include "ffi/expert_group.h"
#include "ffi/handlers.h"
#include "xla/ffi/api/ffi.h"

namespace megamoe {

namespace {

struct WireTestInstance : InstanceState<WireTestInstance> {
  ExpertGroup group;
};

void fill_table(void* view, void* const* mapped, int /*rank*/, int num_ranks, uint64_t /*bytes*/) {
  std::memcpy(view, mapped, num_ranks * sizeof(void*));
}

// "wire": the buffers of no other handler. The view is the table of peers.
constexpr transport::Layout kWireTestLayout = {0x77697265, kWireTestMaxRanks * sizeof(void*), fill_table, nullptr};
constexpr double kSetupSeconds = 120;
constexpr int64_t kMostMicroseconds = int64_t{1} << 40;  // far below what would overflow as nanoseconds

ffi::Error failure(const std::string& what) { return ffi::Error::InvalidArgument("jax_megamoe.wire_test: " + what); }

// The integer attributes of a call.
struct Options {
  int64_t bytes, mode, iterations, shift, mute, timeout_microseconds, transport;

  static ffi::ErrorOr<Options> parse(const ffi::Dictionary& attributes) {
    Options options = {};
    const std::string missing = read_integers(attributes, {{"bytes", &options.bytes},
                                                           {"mode", &options.mode},
                                                           {"iterations", &options.iterations},
                                                           {"shift", &options.shift},
                                                           {"mute", &options.mute},
                                                           {"timeout_microseconds", &options.timeout_microseconds},
                                                           {"transport", &options.transport}});
    if (!missing.empty()) return failure(missing);
    return options;
  }
};

ffi::Error initialize(WireTestInstance* instance, CollectivesContext collectives, int32_t ordinal, ffi::RunId run,
                      ffi::AnyBuffer /*axis_index*/, ffi::Result<ffi::AnyBuffer> /*rows*/, ffi::Dictionary attributes) {
  ffi::ErrorOr<ReplicaGroups> groups = ReplicaGroups::parse(attributes);
  if (groups.has_error()) return std::move(groups).error();
  ffi::ErrorOr<Options> options = Options::parse(attributes);
  if (options.has_error()) return std::move(options).error();
  const int num_ranks = groups.value().size();
  const int64_t bytes = options.value().bytes;
  if (num_ranks > kWireTestMaxRanks || bytes < 16 || bytes % 16 != 0 || bytes > (1 << 30)) {
    return failure("there are " + std::to_string(num_ranks) + " ranks and bytes is " + std::to_string(bytes) +
                   "; wanted 64 ranks at most and a multiple of 16 up to 2^30.");
  }
  if (options.value().transport < 0 || options.value().transport > static_cast<int>(transport::Wanted::kWindow)) {
    return failure("transport is " + std::to_string(options.value().transport) + "; wanted 0 to 2.");
  }
  ffi::ErrorOr<int> device = ExpertGroup::cuda_device(collectives, groups.value());
  if (device.has_error()) return std::move(device).error();
  DeviceScope scope(device.value());
  const cudaError_t error = prepare_wire_test();
  if (error != cudaSuccess) return failure(cuda_failure("loading the kernel", error));
  return instance->group.initialize(collectives, groups.value(), ordinal, run, wire_test_bytes(num_ranks, bytes),
                                    kWireTestLayout, kSetupSeconds,
                                    static_cast<transport::Wanted>(options.value().transport));
}

ffi::Error execute(cudaStream_t stream, WireTestInstance* instance, int32_t ordinal, ffi::AnyBuffer axis_index,
                   ffi::Result<ffi::AnyBuffer> rows, ffi::Dictionary attributes) {
  ffi::ErrorOr<Options> parsed = Options::parse(attributes);
  if (parsed.has_error()) return std::move(parsed).error();
  const Options& options = parsed.value();
  const transport::Member* member = instance->group.find(ordinal);
  if (member == nullptr) return failure("the call was not initialised on this device.");
  if (axis_index.element_type() != ffi::S32 || axis_index.element_count() != 1) {
    return failure("axis_index has another type than int32[1].");
  }
  const size_t wanted_bytes = member->num_ranks() * sizeof(WireTestRow);
  if (rows->size_bytes() != wanted_bytes) {
    return failure("the result has " + std::to_string(rows->size_bytes()) + " bytes; wanted " +
                   std::to_string(wanted_bytes) + ".");
  }
  if (options.mode < 0 || options.mode > 2 || options.iterations < 1 || options.iterations >= kWireTestMaxIterations ||
      options.shift < 0 || options.shift >= member->num_ranks() || options.mute < -1 ||
      options.mute >= member->num_ranks() || options.timeout_microseconds < 1 ||
      options.timeout_microseconds > kMostMicroseconds) {
    return failure("mode, iterations, shift, mute or timeout_microseconds is out of range.");
  }
  WireTestArguments arguments = {};
  arguments.peers = static_cast<void* const*>(member->view());
  arguments.rank = member->rank();
  arguments.num_ranks = member->num_ranks();
  arguments.mode = static_cast<WireTestMode>(options.mode);
  arguments.bytes = options.bytes;
  arguments.iterations = static_cast<int>(options.iterations);
  arguments.shift = static_cast<int>(options.shift);
  arguments.mute = static_cast<int>(options.mute);
  arguments.timeout_nanoseconds = static_cast<uint64_t>(options.timeout_microseconds) * 1000;
  arguments.axis_index = static_cast<const int32_t*>(axis_index.untyped_data());
  arguments.rows = static_cast<WireTestRow*>(rows->untyped_data());
  cudaError_t error = cudaMemsetAsync(arguments.rows, 0, wanted_bytes, stream);
  if (error == cudaSuccess) error = launch_wire_test(arguments, stream);
  if (error != cudaSuccess) return failure(cuda_failure("the launch", error));
  return ffi::Error::Success();
}

}  // namespace

Target wire_test_target() {
  XLA_FFI_DEFINE_HANDLER(kPrepare, request_communicator, ffi::Ffi::BindPrepare().Ctx<Collectives>().Attrs());
  XLA_FFI_DEFINE_HANDLER(kInitialize, initialize,
                         ffi::Ffi::BindInitialize()
                             .Ctx<ffi::State<WireTestInstance>>()
                             .Ctx<Collectives>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .Ctx<ffi::RunId>()
                             .Arg<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Attrs());
  XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::PlatformStream<cudaStream_t>>()
                             .Ctx<ffi::State<WireTestInstance>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .Arg<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Attrs(),
                         {ffi::Traits::kCmdBufferCompatible});
  return target_with_state<WireTestInstance>(
      "jax_megamoe.wire_test.v1", "jax_megamoe.wire_test_instance.v1",
      {{"prepare", kPrepare}, {"initialize", kInitialize}, {"execute", kExecute}});
}

}  // namespace megamoe
