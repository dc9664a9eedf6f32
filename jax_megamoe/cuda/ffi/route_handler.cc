// XLA FFI handler of the router's selection.
#include <cstdint>
#include <string>

#include "common/device_scope.h"
#include "ffi/attributes.h"
#include "ffi/handlers.h"
#include "router/route.h"
#include "xla/ffi/api/ffi.h"

namespace megamoe {

namespace {

ffi::Error failure(const std::string& what) { return ffi::Error::InvalidArgument("jax_megamoe.route: " + what); }

// logits f32[T, E], bias f32[E] or f32[0] for none -> ids s32[T, k], weights f32[T, k].
ffi::Error execute(cudaStream_t stream, ffi::AnyBuffer logits, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> ids,
                   ffi::Result<ffi::AnyBuffer> weights, ffi::Dictionary attributes) {
  int64_t scoring, num_groups, top_groups, sums_two, renormalize;
  const std::string missing = read_integers(attributes, {{"scoring", &scoring},
                                                         {"num_groups", &num_groups},
                                                         {"top_groups", &top_groups},
                                                         {"sums_two", &sums_two},
                                                         {"renormalize", &renormalize}});
  if (!missing.empty()) return failure(missing);
  const auto dims = logits.dimensions(), id_dims = ids->dimensions();
  if (dims.size() != 2 || logits.element_type() != ffi::F32) return failure("logits is not f32[T, E].");
  const int64_t tokens = dims[0], experts = dims[1];
  if (id_dims.size() != 2 || id_dims[0] != tokens || ids->element_type() != ffi::S32) {
    return failure("ids is not s32[T, k].");
  }
  const int64_t top_k = id_dims[1];
  if (weights->element_type() != ffi::F32 || weights->element_count() != ids->element_count()) {
    return failure("weights is not f32[T, k].");
  }
  const int64_t biases = static_cast<int64_t>(bias.element_count());
  if (bias.element_type() != ffi::F32 || (biases != 0 && biases != experts)) return failure("bias is not f32[E].");
  if (experts < 1 || experts > kRouterMaxExperts || top_k < 1 || top_k > kRouterMaxTopK || tokens > INT32_MAX ||
      scoring < 0 || scoring > 2 || num_groups < 1 || experts % num_groups != 0 || top_groups < 1 ||
      top_groups > num_groups || top_k > top_groups * (experts / num_groups)) {
    return failure("there are " + std::to_string(experts) + " experts in " + std::to_string(num_groups) + " groups, " +
                   std::to_string(top_k) + " of which, from " + std::to_string(top_groups) +
                   " groups, are wanted; wanted at most " + std::to_string(kRouterMaxExperts) + " experts, and " +
                   std::to_string(kRouterMaxTopK) + " selected.");
  }
  RouteArguments arguments = {};
  arguments.logits = static_cast<const float*>(logits.untyped_data());
  arguments.bias = biases == 0 ? nullptr : static_cast<const float*>(bias.untyped_data());
  arguments.ids = static_cast<int32_t*>(ids->untyped_data());
  arguments.weights = static_cast<float*>(weights->untyped_data());
  arguments.num_tokens = static_cast<int>(tokens);
  arguments.num_experts = static_cast<int>(experts);
  arguments.top_k = static_cast<int>(top_k);
  arguments.scoring = static_cast<Scoring>(scoring);
  arguments.num_groups = static_cast<int>(num_groups);
  arguments.top_groups = static_cast<int>(top_groups);
  arguments.group_size = Divisor(static_cast<uint32_t>(experts / num_groups));
  arguments.sums_two = sums_two != 0;
  arguments.renormalize = renormalize != 0;
  const cudaError_t error = launch_route(arguments, stream);
  return error == cudaSuccess ? ffi::Error::Success() : failure(cuda_failure("the launch", error));
}

}  // namespace

Target route_target() {
  XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::PlatformStream<cudaStream_t>>()
                             .Arg<ffi::AnyBuffer>()
                             .Arg<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Ret<ffi::AnyBuffer>()
                             .Attrs(),
                         {ffi::Traits::kCmdBufferCompatible});
  return {"jax_megamoe.route.v1", {{"execute", kExecute}}};
}

}  // namespace megamoe
