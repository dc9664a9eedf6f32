#include "ffi/moe_call.h"

#include <initializer_list>

#include "host/counter_arena.h"
#include "common/device_scope.h"

namespace megamoe {

namespace {

std::string shape_text(const ffi::AnyBuffer& buffer) {
  std::string text = "[";
  for (int64_t d : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(d);
  return text + "]";
}

ffi::Error wrong(const char* name, const ffi::AnyBuffer& got, const std::string& wanted) {
  return moe_failure(std::string(name) + " has shape " + shape_text(got) +
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

}  // namespace

ffi::Error moe_failure(const std::string& what) { return ffi::Error::InvalidArgument("jax_megamoe.moe: " + what); }

ffi::Error moe_cuda_failure(const char* what, cudaError_t error) {
  return ffi::Error::Internal(std::string("jax_megamoe.moe: ") + what + " failed: " + cudaGetErrorString(error) + ".");
}

ffi::Error read_problem(const MoeOperands& operands, int num_ranks, Problem* problem, int* num_layers) {
  const auto& [x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, layer] = operands;
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
  if (layers < 1) return moe_failure("the weights are of no layer; pass at least one.");
  if (hidden > kLimit || intermediate > kLimit || experts > kLimit || tokens > kLimit || layers > kLimit) {
    return moe_failure("a dimension exceeds 2^28; pass smaller arrays.");
  }
  *problem = {static_cast<int>(tokens),       static_cast<int>(id_dims[1]), static_cast<int>(hidden),
              static_cast<int>(intermediate), static_cast<int>(experts),    num_ranks};
  *num_layers = static_cast<int>(layers);
  const std::string reason = unsupported_reason(*problem);
  if (!reason.empty()) return moe_failure(reason);
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
  if (layer.element_type() != ffi::S32 || layer.element_count() != 1) return wrong("layer", layer, "int32 []");
  return ffi::Error::Success();
}

ffi::Error read_buffers(const MoeOperands& operands, const MoeResults& results, size_t workspace_bytes,
                        MoeArguments* arguments) {
  const Problem& p = arguments->problem;
  ffi::AnyBuffer y = *results.y, load = *results.load, workspace = *results.workspace;
  arguments->y_is_f32 = y.element_type() == ffi::F32;
  if (!matches(y, arguments->y_is_f32 ? ffi::F32 : ffi::BF16, {p.num_tokens, p.hidden_size})) {
    return wrong("y", y, "bf16 or f32 [T, H]");
  }
  if (!matches(load, ffi::S32, {p.num_local_experts})) return wrong("load", load, "int32 [E]");
  if (workspace.size_bytes() < workspace_bytes) {
    return moe_failure("the workspace has " + std::to_string(workspace.size_bytes()) + " bytes; wanted " +
                       std::to_string(workspace_bytes) + ".");
  }
  arguments->x = static_cast<const uint16_t*>(operands.x.untyped_data());
  arguments->gate_up = static_cast<const uint8_t*>(operands.gate_up.untyped_data());
  arguments->gate_up_scale = static_cast<const float*>(operands.gate_up_scale.untyped_data());
  arguments->down = static_cast<const uint8_t*>(operands.down.untyped_data());
  arguments->down_scale = static_cast<const float*>(operands.down_scale.untyped_data());
  arguments->topk_ids = static_cast<const int32_t*>(operands.topk_ids.untyped_data());
  arguments->topk_weights = static_cast<const float*>(operands.topk_weights.untyped_data());
  arguments->layer = static_cast<const int32_t*>(operands.layer.untyped_data());
  arguments->y = y.untyped_data();
  arguments->load = static_cast<int32_t*>(load.untyped_data());
  return ffi::Error::Success();
}

CallSite::~CallSite() {
  for (const auto& [ordinal, state] : devices_) {
    CounterArena::of_device(state.device).give_back(state.control, state.control_bytes);
  }
}

ffi::Error CallSite::initialize(int ordinal, int device, const Problem& problem, GroupKind kind) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (devices_.count(ordinal) != 0) return ffi::Error::Success();
  const DeviceScope scope(device);
  if (scope.status() != cudaSuccess) return moe_cuda_failure("choosing the device", scope.status());
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) {
    return moe_failure("the device has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
                       "; the fused kernel needs 9.0 (Hopper): pass implementation=\"reference\".");
  }
  Device state;
  state.device = device;
  cudaError_t error = cudaDeviceGetAttribute(&state.num_ctas, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return moe_cuda_failure("reading the number of SMs", error);
  error = prepare_kernels(kind);
  if (error != cudaSuccess) return moe_cuda_failure("loading the kernels", error);
  state.control_bytes = Control::bytes(problem);
  state.counter_words = CounterSet::words(problem);
  void* control = nullptr;
  error = CounterArena::of_device(device).take(state.control_bytes, &control);
  if (error != cudaSuccess) return moe_cuda_failure("allocating the counters", error);
  state.control = static_cast<Control*>(control);
  devices_[ordinal] = state;
  return ffi::Error::Success();
}

const CallSite::Device* CallSite::find(int ordinal) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = devices_.find(ordinal);
  return found == devices_.end() ? nullptr : &found->second;
}

}  // namespace megamoe
