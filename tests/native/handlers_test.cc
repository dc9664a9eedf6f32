// The FFI handlers as XLA calls them, on a machine without a GPU: a launch looks at what it was given instead
// (fake_launches.cc). In: a call each line, in parts apart by semicolons: "moe", "route", "moe_peers" or "wire_test",
// "a type dims..." an operand, "r type dims..." a result, "n name i64|i64s|f32|s32|str value" an attribute, and what is
// wrong with the machine: "f extension none" or "f extension 0.3" of XLA, "f capability 8" of the GPU, "f memory BYTES"
// at most in an allocation, "f driver" that is too old. Out: "refused: " and the error, "launched", or "overrun: " and
// what the launch would touch beyond its buffer.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "fake_launches.h"
#include "fakes.h"
#include "ffi/handlers.h"
#include "xla/ffi/api/collectives_c_api.h"

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

int compute_capability = 9;  // its first number

void* instance;  // what the call keeps; never freed, as one of a program that lives on

// The communicator of a call's groups, of which this process is the last rank of the first.
fakes::Communicator communicator;
XLA_FFI_Collectives_Extension collectives;
bool has_collectives;

XLA_FFI_Error* get_communicator(const XLA_FFI_Collectives_Extension*, XLA_FFI_Communicator_Get_Args* args) {
  communicator.num_ranks = static_cast<int>(args->groups[0].size);
  args->communicator = reinterpret_cast<XLA_FFI_Communicator*>(&communicator);
  return nullptr;
}

void offer_collectives(int major, int minor) {
  has_collectives = true;
  collectives = {};
  collectives.extension_base = {
      sizeof(collectives),
      {XLA_FFI_Extension_Collectives, static_cast<int32_t>(major), static_cast<int32_t>(minor)},
      nullptr};
  collectives.request_communicator = [](const XLA_FFI_Collectives_Extension*,
                                        XLA_FFI_Communicator_Request_Args*) -> XLA_FFI_Error* { return nullptr; };
  collectives.get_communicator = get_communicator;
}

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
    made.XLA_FFI_RunId_Get = [](XLA_FFI_RunId_Get_Args* args) -> XLA_FFI_Error* {
      args->run_id = 1;
      return nullptr;
    };
    made.XLA_FFI_InvokeContext_FindExtension = [](XLA_FFI_InvokeContext_FindExtension_Args* args) -> XLA_FFI_Error* {
      args->extension = has_collectives ? &collectives.extension_base : nullptr;
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
  std::deque<XLA_FFI_Array> arrays;
  std::deque<std::vector<int64_t>> lists;
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
    made.data = reinterpret_cast<void*>(fakes::kNowhere + buffers.size() * (fakes::kNowhere >> 6));
    made.rank = static_cast<int64_t>(sizes.size());
    made.dims = sizes.data();
    fakes::bytes_at[reinterpret_cast<uint64_t>(made.data)] = bytes;
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
    if (kind == "i64s") {  // apart by commas
      std::vector<int64_t>& list = lists.emplace_back();
      std::istringstream numbers(value);
      for (std::string number; std::getline(numbers, number, ',');) list.push_back(std::stoll(number));
      attr_types.push_back(XLA_FFI_AttrType_ARRAY);
      attrs.push_back(&arrays.emplace_back(XLA_FFI_Array{XLA_FFI_DataType_S64, list.size(), list.data()}));
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

void break_machine(std::istream& in) {
  std::string what, value;
  in >> what >> value;
  has_collectives = has_collectives && value != "none";
  if (what == "extension" && has_collectives) offer_collectives(value[0] - '0', value[2] - '0');
  if (what == "capability") compute_capability = std::stoi(value);
  if (what == "memory") fakes::driver().limits[0] = std::stoull(value);
  if (what == "driver") fakes::driver().status = cudaErrorInsufficientDriver;
}

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
    } else if (what == 'f') {
      break_machine(words);
    } else {
      call.attribute(words);
    }
  }
  call.sort_attributes();
  const std::map<std::string, XLA_FFI_ExecutionStage> stages = {{"instantiate", XLA_FFI_ExecutionStage_INSTANTIATE},
                                                                {"prepare", XLA_FFI_ExecutionStage_PREPARE},
                                                                {"initialize", XLA_FFI_ExecutionStage_INITIALIZE},
                                                                {"execute", XLA_FFI_ExecutionStage_EXECUTE}};
  const Target target = call.target == "moe"         ? moe_target()
                        : call.target == "moe_peers" ? moe_peers_target()
                        : call.target == "wire_test" ? wire_test_target()
                                                     : route_target();
  // As XLA does while it registers the type.
  if (target.type_id != nullptr) static_cast<XLA_FFI_TypeId*>(target.type_id)->type_id = 1;
  std::string text;
  for (const auto& [name, handler] : target.stages) {
    XLA_FFI_CallFrame frame = call.frame(stages.at(name));
    if (!has_failed(handler(&frame), &text)) continue;
    if (cudaGetLastError() != cudaSuccess) return "an error is left behind for whoever asks for the last one: " + text;
    return (fakes::launched ? "launched and refused: " : "refused: ") + text;
  }
  if (!fakes::launched) return "neither refused nor launched";
  return fakes::overrun.empty() ? "launched" : "overrun: " + fakes::overrun;
}

}  // namespace

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? compute_capability
           : attribute == cudaDevAttrMultiProcessorCount  ? 132
                                                          : 0;
  return cudaSuccess;
}

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    fakes::forget();
    fakes::driver().limits.clear();
    fakes::driver().status = cudaSuccess;
    compute_capability = 9;
    offer_collectives(0, 2);
    const std::string found = outcome(line);
    std::cout << found.substr(0, found.find('\n')) << std::endl;
  }
}
