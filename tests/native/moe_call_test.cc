// The operands and results of a call, as XLA would hand them over. In: lines "index type dims...", each the change of
// one operand (0 to 7) or result (8 to 10) of a call that is right; "none" leaves it so. After "shared", the leaves of
// two shared experts are operands 8 to 11, and the results come after them. "invariant n": the attribute
// batch_invariant. Out: the error, or the sizes and what each argument points at, by the number of the operand.
#include <cstdint>
#include <iostream>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "ffi/moe_call.h"
#include "layout/weights.h"

using namespace megamoe;

namespace {

struct Array {
  std::string type;
  std::vector<int64_t> dims;
};

// T 3, k 2, H 256, I 384, E 4.
const std::vector<Array> kRight = {
    {"bf16", {3, 256}},    {"f8e4m3fn", {4, 6, 2, 16384}},
    {"f32", {4, 6, 2, 4}}, {"f8e4m3fn", {4, 4, 3, 8192}},
    {"f32", {4, 4, 2, 4}}, {"s32", {3, 2}},
    {"f32", {3, 2}},       {"s32", {}},
    {"bf16", {3, 256}},    {"s32", {4}},
    {"u8", {1 << 20}},
};
constexpr size_t kResults = 3;

const std::map<std::string, XLA_FFI_DataType> kTypes = {
    {"bf16", XLA_FFI_DataType_BF16}, {"f32", XLA_FFI_DataType_F32}, {"f16", XLA_FFI_DataType_F16},
    {"s32", XLA_FFI_DataType_S32},   {"s64", XLA_FFI_DataType_S64}, {"f8e4m3fn", XLA_FFI_DataType_F8E4M3FN},
    {"u8", XLA_FFI_DataType_U8}};

const char* name_of(WeightFormat format) {
  for (const WeightFormatNames& known : kWeightFormats) {
    if (known.format == format) return known.name;
  }
  return "none";
}

size_t number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) / 1024 - 1; }

std::string outcome(const std::vector<Array>& arrays, const std::optional<int64_t>& invariant) {
  std::vector<XLA_FFI_Buffer> buffers;
  for (size_t i = 0; i < arrays.size(); ++i) {
    XLA_FFI_Buffer buffer = {};
    buffer.struct_size = sizeof(buffer);
    buffer.dtype = kTypes.at(arrays[i].type);
    buffer.data = reinterpret_cast<void*>((i + 1) * 1024);
    buffer.rank = static_cast<int64_t>(arrays[i].dims.size());
    buffer.dims = const_cast<int64_t*>(arrays[i].dims.data());
    buffers.push_back(buffer);
  }
  std::vector<void*> pointers;
  for (XLA_FFI_Buffer& buffer : buffers) pointers.push_back(&buffer);
  std::vector<XLA_FFI_ArgType> arg_types(buffers.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(kResults, XLA_FFI_RetType_BUFFER);
  XLA_FFI_Args args = {};
  args.size = static_cast<int64_t>(buffers.size() - kResults);
  args.types = arg_types.data();
  args.args = pointers.data();
  XLA_FFI_Rets rets = {};
  rets.size = kResults;
  rets.types = ret_types.data();
  rets.rets = pointers.data() + args.size;

  // By the order of their names.
  float numbers[2] = {7.0f, 2.5f};
  int64_t flag = invariant.value_or(0);
  XLA_FFI_Scalar scalars[3] = {
      {XLA_FFI_DataType_F32, &numbers[0]}, {XLA_FFI_DataType_S64, &flag}, {XLA_FFI_DataType_F32, &numbers[1]}};
  XLA_FFI_ByteSpan all_names[3] = {{"activation_clamp", 16}, {"batch_invariant", 15}, {"routed_scaling_factor", 21}};
  std::vector<void*> values;
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  for (int i = 0; i < 3; ++i) {
    if (i == 1 && !invariant) continue;
    values.push_back(&scalars[i]);
    name_pointers.push_back(&all_names[i]);
  }
  std::vector<XLA_FFI_AttrType> attr_types(values.size(), XLA_FFI_AttrType_SCALAR);
  XLA_FFI_Attrs attrs = {};
  attrs.size = static_cast<int64_t>(values.size());
  attrs.types = attr_types.data();
  attrs.names = name_pointers.data();
  attrs.attrs = values.data();
  const ffi::Dictionary attributes(&attrs);
  ffi::ErrorOr<MoeCall> call =
      MoeCall::parse(ffi::RemainingArgs(&args, 0), ffi::RemainingRets(&rets, 0), attributes, 1);
  if (call.has_error()) return call.error().message();
  MoeArguments a = {};
  const ffi::Error error = call.value().fill(attributes, 4096, &a);
  if (error.failure()) return error.message();
  std::ostringstream text;
  const Problem& p = a.problem;
  text << "T " << p.num_tokens << " k " << p.top_k << " H " << p.hidden_size << " I " << p.intermediate_size << " E "
       << p.num_local_experts << ' ' << name_of(p.format) << " L " << a.num_layers << " at";
  for (const void* pointer :
       {static_cast<const void*>(a.x), static_cast<const void*>(a.weights.gate_up),
        static_cast<const void*>(a.weights.gate_up_scale), static_cast<const void*>(a.weights.down),
        static_cast<const void*>(a.weights.down_scale), static_cast<const void*>(a.topk_ids),
        static_cast<const void*>(a.topk_weights), static_cast<const void*>(a.layer), static_cast<const void*>(a.y),
        static_cast<const void*>(a.load), static_cast<const void*>(call.value().workspace())}) {
    text << ' ' << number(pointer);
  }
  if (p.num_shared_experts > 0) {
    text << " shared " << p.num_shared_experts << " at";
    for (const void* leaf : a.shared_weights.leaves()) text << ' ' << number(leaf);
  }
  if (p.order == OperandOrder::kNormal) text << " batch-invariant";
  text << (a.y_is_f32 ? " f32" : " bf16") << ' ' << a.activation.clamp << ' ' << a.routed_scaling_factor;
  return text.str();
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::vector<Array> arrays = kRight;
    std::optional<int64_t> invariant;
    // Several changes of one call are apart by semicolons.
    std::istringstream changes(line);
    for (std::string change; std::getline(changes, change, ';');) {
      std::istringstream words(change);
      std::string first;
      words >> first;
      if (first == "none") continue;
      if (first == "invariant") {
        words >> invariant.emplace();
        continue;
      }
      if (first == "shared") {
        const std::vector<Array> leaves = {{"f8e4m3fn", {2, 6, 2, 16384}},
                                           {"f32", {2, 6, 2, 4}},
                                           {"f8e4m3fn", {2, 4, 3, 8192}},
                                           {"f32", {2, 4, 2, 4}}};
        arrays.insert(arrays.end() - kResults, leaves.begin(), leaves.end());
        arrays[arrays.size() - kResults + 1].dims = {6};  // the load
        continue;
      }
      if (first == "fewer") {
        arrays.erase(arrays.begin());
        continue;
      }
      Array& array = arrays[std::stoul(first)];
      array.dims.clear();
      words >> array.type;
      for (int64_t dim; words >> dim;) array.dims.push_back(dim);
    }
    std::cout << outcome(arrays, invariant) << '\n';
  }
}
