// XLA FFI handlers of the fused expert layer: buffers and attributes in, one launch out. No device code here.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "ffi/handlers.h"
#include "host/launch.h"
#include "xla/ffi/api/ffi.h"

namespace megamoe {

namespace ffi = xla::ffi;

namespace {

std::atomic<int64_t> execute_count{0};

ffi::Error cuda_failure(const char* what, cudaError_t error) {
  return ffi::Error::Internal(std::string("jax_megamoe.moe: ") + what + " failed: " + cudaGetErrorString(error) + ".");
}

// What one call site keeps per device: the counters its launches share. Calls of one call site on one device run in order,
// so that nobody else writes them.
struct DeviceState {
  Control* control = nullptr;
  int num_ctas = 0;
};

}  // namespace

class MoeInstance {
 public:
  static ffi::TypeId id;
  static ffi::TypeInfo info;

  ~MoeInstance() {
    // At process exit the driver may be gone already; the memory goes with the context then.
    for (const auto& [device, state] : devices_) {
      if (cudaSetDevice(device) == cudaSuccess) cudaFree(state.control);
    }
  }

  ffi::Error initialize(int device, const Problem& problem) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (devices_.count(device) != 0) return ffi::Error::Success();
    DeviceState state;
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return cuda_failure("choosing the device", error);
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (major != 9 || minor != 0) {
      return ffi::Error::InvalidArgument("jax_megamoe.moe: the device has compute capability " + std::to_string(major) +
                                         "." + std::to_string(minor) +
                                         "; the fused kernel needs 9.0 (Hopper): pass implementation=\"reference\".");
    }
    error = cudaDeviceGetAttribute(&state.num_ctas, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return cuda_failure("reading the number of SMs", error);
    error = prepare_kernels();
    if (error != cudaSuccess) return cuda_failure("loading the kernels", error);
    const size_t bytes = Control::bytes(problem);
    error = cudaMalloc(reinterpret_cast<void**>(&state.control), bytes);
    if (error != cudaSuccess) return cuda_failure("allocating the counters", error);
    error = cudaMemset(state.control, 0, bytes);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    if (error != cudaSuccess) {
      cudaFree(state.control);
      return cuda_failure("clearing the counters", error);
    }
    devices_[device] = state;
    return ffi::Error::Success();
  }

  // Null before `initialize`.
  const DeviceState* find(int device) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = devices_.find(device);
    return found == devices_.end() ? nullptr : &found->second;
  }

 private:
  std::mutex mutex_;
  std::map<int, DeviceState> devices_;
};

ffi::TypeId MoeInstance::id = {};
ffi::TypeInfo MoeInstance::info = ffi::MakeTypeInfo<MoeInstance>();

namespace {

ffi::ErrorOr<std::unique_ptr<MoeInstance>> instantiate() { return std::make_unique<MoeInstance>(); }

std::string shape_text(const ffi::AnyBuffer& buffer) {
  std::string text = "[";
  for (int64_t d : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(d);
  return text + "]";
}

ffi::Error wrong(const char* name, const ffi::AnyBuffer& got, const std::string& wanted) {
  return ffi::Error::InvalidArgument(std::string("jax_megamoe.moe: ") + name + " has shape " + shape_text(got) +
                                     " or another dtype than the kernel takes; wanted " + wanted + ".");
}

bool matches(const ffi::AnyBuffer& buffer, ffi::DataType dtype, std::initializer_list<int64_t> tail,
             int64_t leading = 1) {
  if (buffer.element_type() != dtype) return false;
  const auto dims = buffer.dimensions();
  if (dims.size() < tail.size()) return false;
  int64_t product = 1;
  const size_t extra = dims.size() - tail.size();
  for (size_t i = 0; i < extra; ++i) product *= dims[i];
  size_t i = extra;
  for (int64_t d : tail) {
    if (dims[i++] != d) return false;
  }
  return product == leading;
}

// The operands of a call; fills the sizes and checks every shape, so that no launch can read out of bounds.
ffi::Error read_problem(const ffi::AnyBuffer& x, const ffi::AnyBuffer& gate_up, const ffi::AnyBuffer& gate_up_scale,
                        const ffi::AnyBuffer& down, const ffi::AnyBuffer& down_scale, const ffi::AnyBuffer& topk_ids,
                        const ffi::AnyBuffer& topk_weights, Problem* problem, int* num_layers) {
  const auto x_dims = x.dimensions();
  const auto id_dims = topk_ids.dimensions();
  const auto gate_up_dims = gate_up.dimensions();
  if (x_dims.size() != 2 || x.element_type() != ffi::BF16) return wrong("x", x, "bf16 [T, H]");
  if (id_dims.size() != 2 || id_dims[0] != x_dims[0] || topk_ids.element_type() != ffi::S32) {
    return wrong("topk_ids", topk_ids, "int32 [T, k]");
  }
  if (gate_up_dims.size() != 4 && gate_up_dims.size() != 5) {
    return wrong("gate_up", gate_up, "f8e4m3fn [(L,) E, I/64, H/128, 16384]");
  }
  const bool stacked = gate_up_dims.size() == 5;
  const int64_t layers = stacked ? gate_up_dims[0] : 1;
  const int64_t experts = gate_up_dims[stacked];
  const int64_t tokens = x_dims[0], hidden = x_dims[1], intermediate = gate_up_dims[stacked + 1] * kGateUpTileColumns;
  constexpr int64_t kLimit = 1 << 28;
  if (hidden > kLimit || intermediate > kLimit || experts > kLimit || tokens > kLimit || layers > kLimit) {
    return ffi::Error::InvalidArgument("jax_megamoe.moe: a dimension exceeds 2^28; pass smaller arrays.");
  }
  *problem = {static_cast<int>(tokens), static_cast<int>(id_dims[1]), static_cast<int>(hidden),
              static_cast<int>(intermediate), static_cast<int>(experts)};
  *num_layers = static_cast<int>(layers);
  const std::string reason = unsupported_reason(*problem);
  if (!reason.empty()) return ffi::Error::InvalidArgument("jax_megamoe.moe: " + reason);
  const int64_t leading = layers * experts;
  const int64_t gate_up_tiles = intermediate / kGateUpTileColumns, gate_up_blocks = hidden / kBlockK;
  const int64_t down_tiles = hidden / kDownTileColumns, down_blocks = intermediate / kBlockK;
  if (!matches(gate_up, ffi::F8E4M3FN, {gate_up_tiles, gate_up_blocks, kBlockWeightBytes}, leading)) {
    return wrong("gate_up", gate_up, "f8e4m3fn [(L,) E, I/64, H/128, 16384]");
  }
  if (!matches(gate_up_scale, ffi::F32, {gate_up_tiles, gate_up_blocks, kScaleVectorFloats}, leading)) {
    return wrong("gate_up_scale", gate_up_scale, "f32 [(L,) E, I/64, H/128, 4]");
  }
  if (!matches(down, ffi::F8E4M3FN, {down_tiles, down_blocks, kPlaneBytes}, leading)) {
    return wrong("down", down, "f8e4m3fn [(L,) E, H/64, I/128, 8192]");
  }
  if (!matches(down_scale, ffi::F32, {down_tiles, (down_blocks + 1) / 2, kScaleVectorFloats}, leading)) {
    return wrong("down_scale", down_scale, "f32 [(L,) E, H/64, ceil(I/256), 4]");
  }
  if (!matches(topk_weights, ffi::F32, {tokens, id_dims[1]})) return wrong("topk_weights", topk_weights, "f32 [T, k]");
  return ffi::Error::Success();
}

ffi::Error initialize(MoeInstance* instance, int32_t device, ffi::AnyBuffer x, ffi::AnyBuffer gate_up,
                      ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer down, ffi::AnyBuffer down_scale,
                      ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights, ffi::AnyBuffer /*layer*/,
                      ffi::Result<ffi::AnyBuffer> /*y*/, ffi::Result<ffi::AnyBuffer> /*load*/,
                      ffi::Result<ffi::AnyBuffer> /*workspace*/) {
  Problem problem;
  int num_layers = 1;
  ffi::Error error =
      read_problem(x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, &problem, &num_layers);
  if (error.failure()) return error;
  return instance->initialize(device, problem);
}

ffi::Error execute(cudaStream_t stream, MoeInstance* instance, int32_t device, ffi::AnyBuffer x, ffi::AnyBuffer gate_up,
                   ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer down, ffi::AnyBuffer down_scale,
                   ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights, ffi::AnyBuffer layer,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> load,
                   ffi::Result<ffi::AnyBuffer> workspace, float activation_clamp, float routed_scaling_factor) {
  MoeArguments arguments;
  ffi::Error error = read_problem(x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights,
                                  &arguments.problem, &arguments.num_layers);
  if (error.failure()) return error;
  const Problem& p = arguments.problem;
  const bool y_is_f32 = y->element_type() == ffi::F32;
  if (!matches(*y, y_is_f32 ? ffi::F32 : ffi::BF16, {p.num_tokens, p.hidden_size})) {
    return wrong("y", *y, "bf16 or f32 [T, H]");
  }
  if (!matches(*load, ffi::S32, {p.num_experts})) return wrong("load", *load, "int32 [E]");
  if (layer.element_type() != ffi::S32 || layer.element_count() != 1) return wrong("layer", layer, "int32 []");
  if (workspace->size_bytes() < Workspace::bytes(p)) {
    return ffi::Error::InvalidArgument("jax_megamoe.moe: the workspace has " + std::to_string(workspace->size_bytes()) +
                                       " bytes; wanted " + std::to_string(Workspace::bytes(p)) + ".");
  }
  const DeviceState* state = instance->find(device);
  if (state == nullptr) return ffi::Error::Internal("jax_megamoe.moe: the call was not initialised on this device.");

  arguments.x = static_cast<const uint16_t*>(x.untyped_data());
  arguments.gate_up = static_cast<const uint8_t*>(gate_up.untyped_data());
  arguments.gate_up_scale = static_cast<const float*>(gate_up_scale.untyped_data());
  arguments.down = static_cast<const uint8_t*>(down.untyped_data());
  arguments.down_scale = static_cast<const float*>(down_scale.untyped_data());
  arguments.topk_ids = static_cast<const int32_t*>(topk_ids.untyped_data());
  arguments.topk_weights = static_cast<const float*>(topk_weights.untyped_data());
  arguments.layer = static_cast<const int32_t*>(layer.untyped_data());
  arguments.activation_clamp = activation_clamp;
  arguments.routed_scaling_factor = routed_scaling_factor;
  arguments.y = y->untyped_data();
  arguments.load = static_cast<int32_t*>(load->untyped_data());
  arguments.y_is_f32 = y_is_f32;
  Workspace::carve(p, workspace->untyped_data(), &arguments.workspace);
  arguments.control = state->control;

  execute_count.fetch_add(1, std::memory_order_relaxed);
  const cudaError_t launched = launch_moe(arguments, state->num_ctas, stream);
  if (launched != cudaSuccess) return cuda_failure("the launch", launched);
  return ffi::Error::Success();
}

// The operands and results, the same for every stage that sees them.
template <typename Binding>
auto bind_buffers(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // gate_up
      .template Arg<ffi::AnyBuffer>()   // gate_up_scale
      .template Arg<ffi::AnyBuffer>()   // down
      .template Arg<ffi::AnyBuffer>()   // down_scale
      .template Arg<ffi::AnyBuffer>()   // topk_ids
      .template Arg<ffi::AnyBuffer>()   // topk_weights
      .template Arg<ffi::AnyBuffer>()   // layer
      .template Ret<ffi::AnyBuffer>()   // y
      .template Ret<ffi::AnyBuffer>()   // load
      .template Ret<ffi::AnyBuffer>();  // workspace
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
