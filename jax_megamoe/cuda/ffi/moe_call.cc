#include "ffi/moe_call.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <initializer_list>
#include <sstream>
#include <string>
#include <utility>

#include "ffi/errors.h"
#include "layout/weights.h"

namespace megamoe {

namespace {

// Operands and results in the order of the call. A call with shared experts has their leaves behind the layer.
enum Operand : size_t { kX, kFirstLeaf, kTopkIds = kFirstLeaf + kNumLeaves, kTopkWeights, kLayer, kNumOperands };
constexpr size_t kFirstSharedLeaf = kNumOperands;
enum Result : size_t { kY, kLoad, kWorkspace, kNumResults };

// As "f32[16, 4]".
std::string type_text(const ffi::AnyBuffer& buffer) {
  std::ostringstream text;
  text << buffer.element_type();
  std::string name = text.str();
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  std::string dims;
  for (int64_t d : buffer.dimensions()) dims += (dims.empty() ? "" : ", ") + std::to_string(d);
  return name + "[" + dims + "]";
}

ffi::Error wrong(const char* name, const ffi::AnyBuffer& got, const std::string& wanted) {
  return moe_failure(std::string(name) + " is " + type_text(got) + "; wanted " + wanted + ".");
}

struct ElementType {
  ffi::DataType type;
  const char* name;
};

ElementType type_of(Element element) {
  switch (element) {
    case Element::kF32:
      return {ffi::F32, "f32"};
    case Element::kU8:
      return {ffi::U8, "u8"};
    default:
      return {ffi::F8E4M3FN, "f8e4m3fn"};
  }
}

std::string leaf_name(const WeightLeaf& leaf, size_t first) {
  return (first == kFirstSharedLeaf ? "shared." : "") + std::string(leaf.name);
}

std::string wanted_text(const WeightLeaf& leaf) { return std::string(type_of(leaf.element).name) + leaf.text; }

// By the type of the weights, and by what the last dimension of gate_up_scale counts: a vector, or gate's and up's.
WeightFormat format_of(const ffi::AnyBuffer& gate_up, const ffi::AnyBuffer& gate_up_scale) {
  if (gate_up.element_type() == ffi::U8) return WeightFormat::kMxfp4;
  const auto dims = gate_up_scale.dimensions();
  return dims.size() > 0 && dims.back() == 2 ? WeightFormat::kFp8Channel : WeightFormat::kFp8Block;
}

// Whether the last dimensions are these, and the product of those before them is `leading`.
template <typename Dims>
bool matches(const ffi::AnyBuffer& buffer, ffi::DataType dtype, const Dims& tail, int64_t leading = 1) {
  const auto dims = buffer.dimensions();
  if (buffer.element_type() != dtype || dims.size() < tail.size()) return false;
  const auto* const end_of_lead = dims.end() - tail.size();
  if (!std::equal(tail.begin(), tail.end(), end_of_lead)) return false;
  int64_t product = 1;
  for (const auto* d = dims.begin(); d != end_of_lead; ++d) product *= *d;
  return product == leading;
}

bool matches(const ffi::AnyBuffer& buffer, ffi::DataType dtype, std::initializer_list<int64_t> dims) {
  return matches<std::initializer_list<int64_t>>(buffer, dtype, dims);
}

}  // namespace

ffi::ErrorOr<MoeCall> MoeCall::parse(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                                     const ffi::Dictionary& attributes, int num_ranks, int num_more) {
  const size_t num_operands = kNumOperands + num_more;
  const bool has_shared = args.size() == num_operands + kNumLeaves;
  if ((args.size() != num_operands && !has_shared) || rets.size() != kNumResults) {
    return ffi::Unexpected(
        moe_failure("the call has " + std::to_string(args.size()) + " operands and " + std::to_string(rets.size()) +
                    " results; wanted " + std::to_string(num_operands) + ", or with shared experts " +
                    std::to_string(num_operands + kNumLeaves) + ", and " + std::to_string(kNumResults) +
                    ": trace the program anew with this version of the package."));
  }
  MoeCall call;
  call.has_shared_ = has_shared;
  for (size_t i = 0; i < args.size(); ++i) {
    auto operand = args.get<ffi::AnyBuffer>(i);
    if (operand.has_error()) return ffi::Unexpected(std::move(operand).error());
    call.operands_.push_back(operand.value());
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto result = rets.get<ffi::AnyBuffer>(i);
    if (result.has_error()) return ffi::Unexpected(std::move(result).error());
    call.results_.push_back(*result.value());
  }
  ffi::Error error = call.check(num_ranks);
  if (error.success()) error = call.choose_order(attributes);
  if (error.failure()) return ffi::Unexpected(std::move(error));
  return call;
}

ffi::Error MoeCall::choose_order(const ffi::Dictionary& attributes) {
  // A program that was exported before there was the option says nothing of it.
  if (!attributes.contains("batch_invariant")) return ffi::Error::Success();
  const auto value = attributes.get<int64_t>("batch_invariant");
  if (value.has_error() || (value.value() != 0 && value.value() != 1)) {
    return moe_failure("the attribute batch_invariant is neither 0 nor 1 of 64 bits.");
  }
  problem_.order = value.value() == 1 ? OperandOrder::kNormal : OperandOrder::kByRule;
  return ffi::Error::Success();
}

ffi::Error MoeCall::check(int num_ranks) {
  const ffi::AnyBuffer &x = operands_[kX], &topk_ids = operands_[kTopkIds], &topk_weights = operands_[kTopkWeights];
  const ffi::AnyBuffer &first_leaf = operands_[kFirstLeaf], &layer = operands_[kLayer];
  const auto x_dims = x.dimensions(), id_dims = topk_ids.dimensions(), leaf_dims = first_leaf.dimensions();
  if (x_dims.size() != 2 || x.element_type() != ffi::BF16) return wrong("x", x, "bf16[T, H]");
  if (id_dims.size() != 2 || id_dims[0] != x_dims[0] || topk_ids.element_type() != ffi::S32) {
    return wrong("topk_ids", topk_ids, "s32[T, k]");
  }
  const WeightFormat format = format_of(first_leaf, operands_[kFirstLeaf + 1]);
  bool stacked = false;
  ffi::Error error = find_stack(kFirstLeaf, format, &stacked);
  if (error.failure()) return error;
  const int64_t layers = stacked ? leaf_dims[0] : 1, routed = leaf_dims[stacked];
  const int64_t tokens = x_dims[0], hidden = x_dims[1], intermediate = leaf_dims[stacked + 1] * kGateUpTileColumns;
  int64_t shared = 0;
  if (has_shared_) {
    bool shared_is_stacked = false;
    error = find_stack(kFirstSharedLeaf, format, &shared_is_stacked);
    if (error.failure()) return error;
    shared = operands_[kFirstSharedLeaf].dimensions()[shared_is_stacked];
  }
  const int64_t experts = routed + shared;
  constexpr int64_t kMost = 1 << 28;
  if (layers < 1) return moe_failure("the weights are of no layer; pass at least one.");
  if (std::max({hidden, intermediate, routed, shared, tokens, layers}) > kMost) {
    return moe_failure("a dimension exceeds 2^28; pass smaller arrays.");
  }
  problem_ = {static_cast<int>(tokens),       static_cast<int>(id_dims[1]), static_cast<int>(hidden),
              static_cast<int>(intermediate), static_cast<int>(experts),    num_ranks};
  problem_.format = format;
  problem_.num_shared_experts = static_cast<int>(shared);
  num_layers_ = static_cast<int>(layers);
  const std::string reason = unsupported_reason(problem_);
  if (!reason.empty()) return moe_failure(reason);
  error = check_leaves(kFirstLeaf, layers * routed);
  if (error.success() && has_shared_) error = check_leaves(kFirstSharedLeaf, layers * shared);
  if (error.failure()) return error;
  if (!matches(topk_weights, ffi::F32, {tokens, id_dims[1]})) return wrong("topk_weights", topk_weights, "f32[T, k]");
  if (layer.element_type() != ffi::S32 || layer.element_count() != 1) return wrong("layer", layer, "s32[]");
  return ffi::Error::Success();
}

ffi::Error MoeCall::find_stack(size_t first, WeightFormat format, bool* stacked) const {
  const size_t leaf_rank = std::tuple_size_v<decltype(WeightLeaf::dims)> + 1;
  const size_t rank = operands_[first].dimensions().size();
  *stacked = rank == leaf_rank + 1;
  if (*stacked || rank == leaf_rank) return ffi::Error::Success();
  const WeightLeaf leaf = weight_leaves(format, 0, 0)[0];
  return wrong(leaf_name(leaf, first).c_str(), operands_[first], wanted_text(leaf));
}

ffi::Error MoeCall::check_leaves(size_t first, int64_t experts) const {
  const auto leaves = weight_leaves(problem_.format, problem_.hidden_size, problem_.intermediate_size);
  for (int i = 0; i < kNumLeaves; ++i) {
    const ffi::AnyBuffer& operand = operands_[first + i];
    if (!matches(operand, type_of(leaves[i].element).type, leaves[i].dims, experts)) {
      return wrong(leaf_name(leaves[i], first).c_str(), operand, wanted_text(leaves[i]));
    }
  }
  return ffi::Error::Success();
}

ffi::AnyBuffer MoeCall::more(int index) const {
  return operands_[kNumOperands + (has_shared_ ? kNumLeaves : 0) + index];
}

ExpertWeights MoeCall::weights_at(size_t first) const {
  std::array<const void*, kNumLeaves> leaves;
  for (int i = 0; i < kNumLeaves; ++i) leaves[i] = operands_[first + i].untyped_data();
  return ExpertWeights::at(leaves);
}

void* MoeCall::workspace() const { return results_[kWorkspace].untyped_data(); }

ffi::Error MoeCall::fill(const ffi::Dictionary& attributes, size_t workspace_bytes, MoeArguments* arguments) const {
  const auto clamp = attributes.get<float>("activation_clamp");
  const auto factor = attributes.get<float>("routed_scaling_factor");
  if (clamp.has_error() || factor.has_error()) {
    return moe_failure("the call lacks the attribute activation_clamp or routed_scaling_factor.");
  }
  const ffi::AnyBuffer &y = results_[kY], &load = results_[kLoad], &workspace = results_[kWorkspace];
  const bool y_is_f32 = y.element_type() == ffi::F32;
  if (!matches(y, y_is_f32 ? ffi::F32 : ffi::BF16, {problem_.num_tokens, problem_.hidden_size})) {
    return wrong("y", y, "bf16 or f32[T, H]");
  }
  if (!matches(load, ffi::S32, {problem_.num_local_experts}))
    return wrong("load", load, "s32[E], shared experts first");
  if (workspace.size_bytes() < workspace_bytes) {
    return moe_failure("the workspace has " + std::to_string(workspace.size_bytes()) + " bytes; wanted " +
                       std::to_string(workspace_bytes) + ".");
  }
  arguments->problem = problem_;
  arguments->num_layers = num_layers_;
  arguments->weights = weights_at(kFirstLeaf);
  if (has_shared_) arguments->shared_weights = weights_at(kFirstSharedLeaf);
  arguments->x = static_cast<const uint16_t*>(operands_[kX].untyped_data());
  arguments->topk_ids = static_cast<const int32_t*>(operands_[kTopkIds].untyped_data());
  arguments->topk_weights = static_cast<const float*>(operands_[kTopkWeights].untyped_data());
  arguments->layer = static_cast<const int32_t*>(operands_[kLayer].untyped_data());
  // A program that was exported before there was another activation says the clamp alone.
  const auto number = [&](const char* name, float otherwise) {
    const auto found = attributes.get<float>(name);
    return found.has_error() ? otherwise : found.value();
  };
  Activation& activation = arguments->activation;
  activation.clamp = clamp.value();
  activation.alpha = number("activation_alpha", 1.0f);
  activation.up_offset = number("activation_up_offset", 0.0f);
  activation.beta = number("situ_beta", 0.0f);
  activation.linear_beta = number("situ_linear_beta", 0.0f);
  arguments->routed_scaling_factor = factor.value();
  arguments->y = y.untyped_data();
  arguments->y_is_f32 = y_is_f32;
  arguments->load = static_cast<int32_t*>(load.untyped_data());
  return ffi::Error::Success();
}

}  // namespace megamoe
