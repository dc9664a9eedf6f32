// XLA FFI handlers of the fused expert layer on one device: buffers and attributes in, one launch out. No device code
// here.
#include <atomic>
#include <cstdint>
#include <utility>

#include "ffi/call_site.h"
#include "ffi/errors.h"
#include "ffi/handlers.h"
#include "ffi/moe_call.h"

namespace megamoe {

namespace {

struct MoeInstance : InstanceState<MoeInstance> {
  CallSite site;
};

std::atomic<int64_t> execute_count{0};

ffi::Error initialize(MoeInstance* instance, int32_t device, ffi::RemainingArgs args, ffi::RemainingRets rets,
                      ffi::Dictionary attributes) {
  ffi::ErrorOr<MoeCall> call = MoeCall::parse(args, rets, attributes, 1);
  if (call.has_error()) return std::move(call).error();
  return instance->site.initialize(device, device, per_launch(call.value().problem()), prepare_moe);
}

ffi::Error execute(cudaStream_t stream, MoeInstance* instance, int32_t device, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary attributes) {
  const CallSite::Device* state = instance->site.find(device);
  if (state == nullptr) return ffi::Error::Internal("jax_megamoe.moe: the call was not initialised on this device.");
  ffi::ErrorOr<MoeCall> call = MoeCall::parse(args, rets, attributes, 1);
  if (call.has_error()) return std::move(call).error();
  const Problem part = per_launch(call.value().problem());
  MoeArguments arguments = {};
  ffi::Error error = call.value().fill(attributes, Workspace::bytes(part), &arguments);
  if (error.failure()) return error;
  arguments.workspace.carve(part, call.value().workspace());
  arguments.control = state->control;
  arguments.counter_words = state->counter_words;

  execute_count.fetch_add(1, std::memory_order_relaxed);
  const cudaError_t launched = launch_moe(arguments, part.num_tokens, state->num_ctas, stream);
  if (launched != cudaSuccess) return moe_cuda_failure("the launch", launched);
  return ffi::Error::Success();
}

}  // namespace

Target moe_target() {
  XLA_FFI_DEFINE_HANDLER(kInitialize, initialize,
                         ffi::Ffi::BindInitialize()
                             .Ctx<ffi::State<MoeInstance>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attrs());
  XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::PlatformStream<cudaStream_t>>()
                             .Ctx<ffi::State<MoeInstance>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attrs(),
                         {ffi::Traits::kCmdBufferCompatible});
  return target_with_state<MoeInstance>("jax_megamoe.moe.v1", "jax_megamoe.moe_instance.v1",
                                        {{"initialize", kInitialize}, {"execute", kExecute}});
}

int64_t moe_execute_count() { return execute_count.load(std::memory_order_relaxed); }

}  // namespace megamoe
