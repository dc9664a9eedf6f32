// XLA FFI handlers of the fused expert layer on one device: buffers and attributes in, one launch out. No device code here.
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "ffi/handlers.h"
#include "ffi/moe_call.h"

namespace megamoe {

class MoeInstance {
 public:
  static ffi::TypeId id;
  static ffi::TypeInfo info;
  CallSite site;
};

ffi::TypeId MoeInstance::id = {};
ffi::TypeInfo MoeInstance::info = ffi::MakeTypeInfo<MoeInstance>();

namespace {

std::atomic<int64_t> execute_count{0};

ffi::ErrorOr<std::unique_ptr<MoeInstance>> instantiate() { return std::make_unique<MoeInstance>(); }

ffi::Error initialize(MoeInstance* instance, int32_t device, ffi::AnyBuffer x, ffi::AnyBuffer gate_up,
                      ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer down, ffi::AnyBuffer down_scale,
                      ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights, ffi::AnyBuffer layer,
                      ffi::Result<ffi::AnyBuffer> /*y*/, ffi::Result<ffi::AnyBuffer> /*load*/,
                      ffi::Result<ffi::AnyBuffer> /*workspace*/) {
  const MoeOperands operands{x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, layer};
  Problem problem;
  int num_layers = 1;
  ffi::Error error = read_problem(operands, 1, &problem, &num_layers);
  if (error.failure()) return error;
  return instance->site.initialize(device, device, per_launch(problem), GroupKind::kOneRank);
}

ffi::Error execute(cudaStream_t stream, MoeInstance* instance, int32_t device, ffi::AnyBuffer x, ffi::AnyBuffer gate_up,
                   ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer down, ffi::AnyBuffer down_scale,
                   ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights, ffi::AnyBuffer layer,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> load,
                   ffi::Result<ffi::AnyBuffer> workspace, float activation_clamp, float routed_scaling_factor) {
  const MoeOperands operands{x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, layer};
  MoeArguments arguments = {};
  ffi::Error error = read_problem(operands, 1, &arguments.problem, &arguments.num_layers);
  if (error.failure()) return error;
  const Problem part = per_launch(arguments.problem);
  error = read_buffers(operands, {y, load, workspace}, Workspace::bytes(part), &arguments);
  if (error.failure()) return error;
  const CallSite::Device* state = instance->site.find(device);
  if (state == nullptr) return ffi::Error::Internal("jax_megamoe.moe: the call was not initialised on this device.");
  arguments.activation_clamp = activation_clamp;
  arguments.routed_scaling_factor = routed_scaling_factor;
  arguments.workspace.carve(part, workspace->untyped_data());
  arguments.control = state->control;
  arguments.counter_words = state->counter_words;

  execute_count.fetch_add(1, std::memory_order_relaxed);
  const cudaError_t launched = launch_moe(arguments, part.num_tokens, state->num_ctas, stream);
  if (launched != cudaSuccess) return moe_cuda_failure("the launch", launched);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoeInstantiate, instantiate, ffi::Ffi::BindInstantiate());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MoeInitialize, initialize,
    bind_buffers(ffi::Ffi::BindInitialize().Ctx<ffi::State<MoeInstance>>().Ctx<ffi::DeviceOrdinal>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoeExecute, execute,
                              bind_buffers(ffi::Ffi::Bind()
                                               .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                               .Ctx<ffi::State<MoeInstance>>()
                                               .Ctx<ffi::DeviceOrdinal>())
                                  .Attr<float>("activation_clamp")
                                  .Attr<float>("routed_scaling_factor"),
                              {ffi::Traits::kCmdBufferCompatible});

void* moe_instance_type_id() { return &MoeInstance::id; }
void* moe_instance_type_info() { return &MoeInstance::info; }
int64_t moe_execute_count() { return execute_count.load(std::memory_order_relaxed); }

}  // namespace megamoe
