#include "router/route.h"

#include "router/token_router.cuh"

namespace megamoe {

namespace {

template <int kValues>
__global__ void __launch_bounds__(routing::kThreads) route(const __grid_constant__ RouteArguments args) {
  __shared__ routing::SharedRoute shared;
  routing::TokenRouter<kValues>(args, shared).run();
}

}  // namespace

cudaError_t launch_route(const RouteArguments& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return cudaSuccess;
  const auto kernel = args.num_experts <= routing::kThreads       ? route<1>
                      : args.num_experts <= 2 * routing::kThreads ? route<2>
                      : args.num_experts <= 4 * routing::kThreads ? route<4>
                                                                  : route<8>;
  kernel<<<args.num_tokens, routing::kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace megamoe
