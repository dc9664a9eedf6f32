// What the handlers of the fused layer have in common: operands and results, their checks, and the counters of a call site.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "host/launch.h"
#include "xla/ffi/api/ffi.h"

namespace megamoe {

namespace ffi = xla::ffi;

// In the order of the call.
struct MoeOperands {
  ffi::AnyBuffer x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, layer;
};

struct MoeResults {
  ffi::Result<ffi::AnyBuffer> y, load, workspace;
};

// The same for every stage that sees buffers.
template <typename Binding>
auto bind_operands(Binding&& binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // gate_up
      .template Arg<ffi::AnyBuffer>()   // gate_up_scale
      .template Arg<ffi::AnyBuffer>()   // down
      .template Arg<ffi::AnyBuffer>()   // down_scale
      .template Arg<ffi::AnyBuffer>()   // topk_ids
      .template Arg<ffi::AnyBuffer>()   // topk_weights
      .template Arg<ffi::AnyBuffer>();  // layer
}
template <typename Binding>
auto bind_results(Binding&& binding) {
  return std::move(binding)
      .template Ret<ffi::AnyBuffer>()   // y
      .template Ret<ffi::AnyBuffer>()   // load
      .template Ret<ffi::AnyBuffer>();  // workspace
}
template <typename Binding>
auto bind_buffers(Binding&& binding) {
  return bind_results(bind_operands(std::forward<Binding>(binding)));
}

ffi::Error moe_failure(const std::string& what);
ffi::Error moe_cuda_failure(const char* what, cudaError_t error);

// The sizes of a call, and whether every operand has the shape that goes with them, so that no launch can read out of bounds.
ffi::Error read_problem(const MoeOperands& operands, int num_ranks, Problem* problem, int* num_layers);

// Sets all arguments but the workspace, the counters and the peers. `problem` and `num_layers` are set
// already. `workspace_bytes`: what the result for scratch has to hold.
ffi::Error read_buffers(const MoeOperands& operands, const MoeResults& results, size_t workspace_bytes,
                        MoeArguments* arguments);

// What one call site keeps per device: the counters its launches share. Calls of one call site on one device run in order,
// so that nobody else writes them.
class CallSite {
 public:
  struct Device {
    int device = 0;  // the CUDA runtime's number
    Control* control = nullptr;
    size_t control_bytes = 0;
    int counter_words = 0;
    int num_ctas = 0;
  };

  ~CallSite();

  // `ordinal` names it, `device` is the CUDA runtime's number; `problem` is that of the call's largest launch.
  ffi::Error initialize(int ordinal, int device, const Problem& problem, GroupKind kind);

  // Null before `initialize`.
  const Device* find(int ordinal) const;

 private:
  mutable std::mutex mutex_;
  std::map<int, Device> devices_;  // by ordinal
};

}  // namespace megamoe
