// The handlers of one device as XLA calls them, on a machine without a GPU: a launch looks at what it was given
// instead. In: a call each line, in parts apart by semicolons: "moe" or "route", "a type dims..." an operand, "r type
// dims..." a result, "n name i64|f32|s32|str value" an attribute. Out: "refused: " and the error, "launched", or
// "overrun: " and what the launch would touch beyond its buffer.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "ffi/handlers.h"
#include "host/launch.h"
#include "layout/weights.h"
#include "layout/workspace.h"
#include "router/route.h"

using namespace megamoe;

struct XLA_FFI_Error {
  std::string text;
};

namespace {

struct Type {
  XLA_FFI_DataType type;
  uint64_t bytes;
};
const std::map<std::string, Type> kTypes = {
    {"pred", {XLA_FFI_DataType_PRED, 1}},    {"s8", {XLA_FFI_DataType_S8, 1}},
    {"s32", {XLA_FFI_DataType_S32, 4}},      {"s64", {XLA_FFI_DataType_S64, 8}},
    {"u8", {XLA_FFI_DataType_U8, 1}},        {"u32", {XLA_FFI_DataType_U32, 4}},
    {"f16", {XLA_FFI_DataType_F16, 2}},      {"bf16", {XLA_FFI_DataType_BF16, 2}},
    {"f32", {XLA_FFI_DataType_F32, 4}},      {"f64", {XLA_FFI_DataType_F64, 8}},
    {"c64", {XLA_FFI_DataType_C64, 8}},      {"f8e4m3fn", {XLA_FFI_DataType_F8E4M3FN, 1}},
    {"f8e5m2", {XLA_FFI_DataType_F8E5M2, 1}}};

// Nothing reads or writes them: addresses far apart, each with its buffer's bytes.
constexpr uint64_t kApart = uint64_t{1} << 56;
std::map<uint64_t, __uint128_t> bytes_at;
std::string overrun;
bool launched;

void touch(const char* name, const void* pointer, __uint128_t bytes) {
  const auto found = bytes_at.find(reinterpret_cast<uint64_t>(pointer));
  const bool fits = found != bytes_at.end() && bytes <= found->second;
  if (!fits && bytes > 0) overrun += std::string(overrun.empty() ? "" : ", ") + name;
}

void* instance;  // what the call keeps; never freed, as one of a program that lives on

bool has_failed(XLA_FFI_Error* error, std::string* text) {
  const std::unique_ptr<XLA_FFI_Error> owned(error);
  if (error != nullptr) *text = error->text;
  return error != nullptr;
}

const XLA_FFI_Api* api() {
  static XLA_FFI_Api fake = [] {
    XLA_FFI_Api made = {};
    made.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    made.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    made.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; };
    made.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
    made.XLA_FFI_Stream_Get = [](XLA_FFI_Stream_Get_Args* args) -> XLA_FFI_Error* {
      args->stream = nullptr;
      return nullptr;
    };
    made.XLA_FFI_State_Set = [](XLA_FFI_State_Set_Args* args) -> XLA_FFI_Error* {
      instance = args->state;
      return nullptr;
    };
    made.XLA_FFI_State_Get = [](XLA_FFI_State_Get_Args* args) -> XLA_FFI_Error* {
      args->state = instance;
      return nullptr;
    };
    made.XLA_FFI_DeviceOrdinal_Get = [](XLA_FFI_DeviceOrdinal_Get_Args* args) -> XLA_FFI_Error* {
      args->device_ordinal = 0;
      return nullptr;
    };
    return made;
  }();
  return &fake;
}

// A call, and the memory of what describes it to the handlers.
struct Call {
  std::string target;
  std::deque<std::vector<int64_t>> dims;
  std::deque<XLA_FFI_Buffer> buffers;
  std::deque<std::string> texts;
  std::deque<XLA_FFI_ByteSpan> spans;
  std::deque<XLA_FFI_Scalar> scalars;
  std::deque<int64_t> words;
  std::vector<void*> args, rets, attrs;
  std::vector<XLA_FFI_ArgType> arg_types;
  std::vector<XLA_FFI_RetType> ret_types;
  std::vector<XLA_FFI_AttrType> attr_types;
  std::vector<XLA_FFI_ByteSpan*> names;

  void* buffer(std::istream& in) {
    std::string type;
    in >> type;
    std::vector<int64_t>& sizes = dims.emplace_back();
    __uint128_t bytes = kTypes.at(type).bytes;
    for (int64_t size; in >> size;) {
      sizes.push_back(size);
      bytes *= static_cast<uint64_t>(size);
    }
    XLA_FFI_Buffer& made = buffers.emplace_back();
    made = {};
    made.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    made.dtype = kTypes.at(type).type;
    made.data = reinterpret_cast<void*>(kApart + buffers.size() * (kApart >> 6));
    made.rank = static_cast<int64_t>(sizes.size());
    made.dims = sizes.data();
    bytes_at[reinterpret_cast<uint64_t>(made.data)] = bytes;
    return &made;
  }

  XLA_FFI_ByteSpan* span(const std::string& text) {
    const std::string& kept = texts.emplace_back(text);
    return &spans.emplace_back(XLA_FFI_ByteSpan{kept.data(), kept.size()});
  }

  void attribute(std::istream& in) {
    std::string name, kind, value;
    in >> name >> kind >> value;
    names.push_back(span(name));
    if (kind == "str") {
      attr_types.push_back(XLA_FFI_AttrType_STRING);
      attrs.push_back(span(value));
      return;
    }
    int64_t& word = words.emplace_back(0);
    if (kind == "i64") word = std::stoll(value);
    if (kind == "s32") *reinterpret_cast<int32_t*>(&word) = std::stoi(value);
    if (kind == "f32") *reinterpret_cast<float*>(&word) = std::stof(value);
    const XLA_FFI_DataType type = kind == "i64"   ? XLA_FFI_DataType_S64
                                  : kind == "s32" ? XLA_FFI_DataType_S32
                                                  : XLA_FFI_DataType_F32;
    attr_types.push_back(XLA_FFI_AttrType_SCALAR);
    attrs.push_back(&scalars.emplace_back(XLA_FFI_Scalar{type, &word}));
  }

  // XLA has the attributes in the order of their names.
  void sort_attributes() {
    std::map<std::string, size_t> order;
    for (size_t i = 0; i < names.size(); ++i) order[std::string(names[i]->ptr, names[i]->len)] = i;
    std::vector<XLA_FFI_ByteSpan*> sorted_names;
    std::vector<XLA_FFI_AttrType> sorted_types;
    std::vector<void*> sorted;
    for (const auto& [name, i] : order) {
      sorted_names.push_back(names[i]);
      sorted_types.push_back(attr_types[i]);
      sorted.push_back(attrs[i]);
    }
    names = sorted_names, attr_types = sorted_types, attrs = sorted;
  }

  XLA_FFI_CallFrame frame(XLA_FFI_ExecutionStage stage) {
    XLA_FFI_CallFrame made = {};
    made.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    made.api = api();
    made.stage = stage;
    if (stage == XLA_FFI_ExecutionStage_INSTANTIATE) return made;
    made.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()), arg_types.data(), args.data()};
    made.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()), ret_types.data(), rets.data()};
    made.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      static_cast<int64_t>(attrs.size()),
                  attr_types.data(),         names.data(), attrs.data()};
    return made;
  }
};

std::string outcome(const std::string& line) {
  Call call;
  std::istringstream parts(line);
  std::getline(parts, call.target, ';');
  for (std::string part; std::getline(parts, part, ';');) {
    std::istringstream words(part);
    char what;
    words >> what;
    if (what == 'a') {
      call.args.push_back(call.buffer(words));
      call.arg_types.push_back(XLA_FFI_ArgType_BUFFER);
    } else if (what == 'r') {
      call.rets.push_back(call.buffer(words));
      call.ret_types.push_back(XLA_FFI_RetType_BUFFER);
    } else {
      call.attribute(words);
    }
  }
  call.sort_attributes();
  const std::map<std::string, XLA_FFI_ExecutionStage> stages = {{"instantiate", XLA_FFI_ExecutionStage_INSTANTIATE},
                                                                {"initialize", XLA_FFI_ExecutionStage_INITIALIZE},
                                                                {"execute", XLA_FFI_ExecutionStage_EXECUTE}};
  const Target target = call.target == "moe" ? moe_target() : route_target();
  // As XLA does while it registers the type.
  if (target.type_id != nullptr) static_cast<XLA_FFI_TypeId*>(target.type_id)->type_id = 1;
  std::string text;
  for (const auto& [name, handler] : target.stages) {
    XLA_FFI_CallFrame frame = call.frame(stages.at(name));
    if (has_failed(handler(&frame), &text)) return (launched ? "launched and refused: " : "refused: ") + text;
  }
  if (!launched) return "neither refused nor launched";
  return overrun.empty() ? "launched" : "overrun: " + overrun;
}

}  // namespace

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrMultiProcessorCount ? 132 : 0;
  return cudaSuccess;
}

namespace megamoe {

cudaError_t prepare_moe(WeightFormat) { return cudaSuccess; }

// What the kernel touches follows from the problem alone.
cudaError_t launch_moe(const MoeArguments& a, int tokens_per_launch, int, cudaStream_t) {
  launched = true;
  const Problem& p = a.problem;
  const __uint128_t tokens = p.num_tokens, slots = tokens * p.top_k;
  touch("x", a.x, tokens * p.hidden_size * 2);
  touch("y", a.y, tokens * p.hidden_size * (a.y_is_f32 ? 4 : 2));
  touch("topk_ids", a.topk_ids, slots * 4);
  touch("topk_weights", a.topk_weights, slots * 4);
  touch("layer", a.layer, 4);
  touch("load", a.load, __uint128_t{4} * p.num_local_experts);
  const auto leaves = weight_leaves(p.format, p.hidden_size, p.intermediate_size);
  const __uint128_t routed = p.num_local_experts - p.num_shared_experts, layers = a.num_layers;
  for (int i = 0; i < kNumLeaves; ++i) {
    __uint128_t bytes = leaves[i].element == Element::kF32 ? 4 : 1;
    for (int64_t size : leaves[i].dims) bytes *= static_cast<uint64_t>(size);
    touch(leaves[i].name, a.weights.leaves()[i], bytes * routed * layers);
    if (p.num_shared_experts > 0) {
      touch("shared", a.shared_weights.leaves()[i], bytes * p.num_shared_experts * layers);
    }
  }
  Problem part = p;
  part.num_tokens = tokens_per_launch;
  // The workspace is carved into parts, of which the first begins at its address.
  const bool has_room = [&] {
    for (const auto& [address, bytes] : bytes_at) {
      Workspace carved = {};
      carved.carve(part, reinterpret_cast<void*>(address));
      if (std::memcmp(&carved, &a.workspace, sizeof(carved)) == 0) return bytes >= Workspace::bytes(part);
    }
    return false;
  }();
  if (!has_room) overrun += " workspace";
  return cudaSuccess;
}

cudaError_t launch_route(const RouteArguments& a, cudaStream_t) {
  launched = true;
  const __uint128_t tokens = a.num_tokens;
  touch("logits", a.logits, tokens * a.num_experts * 4);
  touch("ids", a.ids, tokens * a.top_k * 4);
  touch("weights", a.weights, tokens * a.top_k * 4);
  if (a.bias != nullptr) touch("bias", a.bias, __uint128_t{4} * a.num_experts);
  return cudaSuccess;
}

}  // namespace megamoe

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    bytes_at.clear();
    overrun.clear();
    launched = false;
    std::cout << outcome(line) << std::endl;
  }
}
