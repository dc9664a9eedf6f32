// The Python module `jax_megamoe._core`: it only hands out registrations and sizes.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "host/choices.h"
#include "host/limits.h"
#include "layout/peer_buffer.h"
#include "layout/weights.h"
#include "transport/identity.h"

#ifdef MEGAMOE_CUDA
#include <cuda_runtime_api.h>

#include "common/device_scope.h"
#include "ffi/handlers.h"
#include "transport/registry.h"
#endif

#ifdef MEGAMOE_TESTING
#include "testing/hold_sms.h"
#include "testing/targets.h"
#endif

namespace py = pybind11;

namespace {

#ifdef MEGAMOE_CUDA
// Adds what one target registers.
void add(const megamoe::Target& target, py::dict types, py::dict targets) {
  if (target.type_name != nullptr) {
    py::dict type;
    type["type_id"] = py::capsule(target.type_id);
    type["type_info"] = py::capsule(target.type_info);
    types[target.type_name] = type;
  }
  py::dict capsules;
  for (const auto& [stage, handler] : target.stages) capsules[stage] = py::capsule(reinterpret_cast<void*>(handler));
  targets[target.name] = capsules;
}

// Whether device `from` can reach the memory of `to`, both ordinals of this process; an exception where there is no
// driver.
bool can_access_peer(int from, int to) {
  if (from == to) return true;
  int possible = 0;
  const cudaError_t error = cudaDeviceCanAccessPeer(&possible, from, to);
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("jax_megamoe: asking whether device " + std::to_string(from) + " reaches device " +
                             std::to_string(to) + " failed: " + cudaGetErrorString(error));
  }
  return possible != 0;
}

py::list symmetric_memories() {
  py::list all;
  for (const megamoe::transport::Description& memory : megamoe::transport::Registry::get().describe_all()) {
    py::dict entry;
    entry["device"] = memory.device;
    entry["rank"] = memory.rank;
    entry["num_ranks"] = memory.num_ranks;
    entry["bytes"] = memory.bytes;
    entry["transport"] = memory.transport;
    entry["spans_processes"] = memory.spans_processes;
    entry["failure"] = memory.failure;
    all.append(entry);
  }
  return all;
}
#endif

#ifdef MEGAMOE_TESTING
void hold_sms(int device, int ctas, int milliseconds) {
  const megamoe::DeviceScope scope(device);
  cudaError_t error = scope.status();
  if (error == cudaSuccess) error = megamoe::hold_sms(ctas, milliseconds);
  if (error != cudaSuccess) throw std::runtime_error(megamoe::cuda_failure("hold_sms", error));
}
#endif

// {"types": {name: {"type_id", "type_info"}}, "targets": {name: {stage: capsule}}}; types have to be registered first.
py::dict ffi_registrations() {
  py::dict types, targets;
#ifdef MEGAMOE_CUDA
  add(megamoe::moe_target(), types, targets);
  add(megamoe::moe_peers_target(), types, targets);
  add(megamoe::route_target(), types, targets);
  add(megamoe::wire_test_target(), types, targets);
#endif
#ifdef MEGAMOE_TESTING
  add(megamoe::virtual_ranks_target(), types, targets);
  add(megamoe::read_ceiling_target(), types, targets);
#endif
  py::dict registrations;
  registrations["types"] = types;
  registrations["targets"] = targets;
  return registrations;
}

megamoe::WeightFormat format_named(const std::string& name) {
  if (const auto* known = megamoe::find_format(name)) return known->format;
  throw py::value_error("jax_megamoe.moe: the weights' format is " + name + "; this build has none of that name.");
}

// Of a call's largest launch.
megamoe::Problem checked_problem(int num_tokens, int top_k, int hidden_size, int intermediate_size,
                                 int num_local_experts, const std::string& weight_format, bool batch_invariant,
                                 int num_ranks) {
  megamoe::Problem problem{num_tokens, top_k, hidden_size, intermediate_size, num_local_experts, num_ranks};
  problem.format = format_named(weight_format);
  if (batch_invariant) problem.order = megamoe::OperandOrder::kNormal;
  const std::string reason = megamoe::unsupported_reason(problem);
  if (!reason.empty()) throw py::value_error("jax_megamoe.moe: " + reason);
  return megamoe::per_launch(problem);
}

int64_t workspace_bytes(int num_tokens, int top_k, int hidden_size, int intermediate_size, int num_local_experts,
                        const std::string& weight_format, bool batch_invariant) {
  return megamoe::Workspace::bytes(checked_problem(num_tokens, top_k, hidden_size, intermediate_size, num_local_experts,
                                                   weight_format, batch_invariant, 1));
}

int64_t peer_workspace_bytes(int num_tokens, int top_k, int hidden_size, int intermediate_size, int num_local_experts,
                             const std::string& weight_format, bool batch_invariant, int num_ranks) {
  return megamoe::Workspace::local_bytes(checked_problem(num_tokens, top_k, hidden_size, intermediate_size,
                                                         num_local_experts, weight_format, batch_invariant, num_ranks));
}

int64_t peer_buffer_bytes(int num_tokens, int top_k, int hidden_size, int intermediate_size, int num_local_experts,
                          const std::string& weight_format, bool batch_invariant, int num_ranks) {
  return megamoe::PeerBuffer::bytes_for(checked_problem(num_tokens, top_k, hidden_size, intermediate_size,
                                                        num_local_experts, weight_format, batch_invariant, num_ranks));
}

// What a launch is like on a device with so many SMs, all of which run clusters, and so fast a memory.
py::dict launch_choice(int num_tokens, int top_k, int hidden_size, int intermediate_size, int num_local_experts,
                       const std::string& weight_format, int num_ranks, int num_sms, double bytes_per_microsecond,
                       bool batch_invariant) {
  const megamoe::Device device{num_sms, num_sms, num_sms / 2, bytes_per_microsecond};
  const megamoe::Problem problem = checked_problem(num_tokens, top_k, hidden_size, intermediate_size, num_local_experts,
                                                   weight_format, batch_invariant, num_ranks);
  const megamoe::LaunchChoice choice = megamoe::choose(problem, problem, device, num_ranks > 1);
  py::dict entries;
  entries["swap_operands"] = choice.swap_operands;
  entries["cluster_ctas"] = choice.cluster_ctas;
  entries["gathers_rows"] = choice.gathers_rows;
  entries["assembles_images"] = choice.assembles_images;
  entries["activations_stay"] = choice.activations_stay;
  entries["weight_bytes_in_flight"] = choice.weight_bytes_in_flight;
  entries["ctas_per_sm"] = choice.ctas_per_sm;
  entries["has_lone_token"] = choice.has_lone_token;
  return entries;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "XLA FFI registrations of jax_megamoe.";
#ifdef MEGAMOE_CUDA
  module.attr("has_cuda") = true;
  module.def("moe_execute_count", &megamoe::moe_execute_count,
             "Times the fused kernel's handler ran in this process; replayed command buffers do not count.");
  module.def("can_access_peer", &can_access_peer, py::arg("from_device"), py::arg("to_device"),
             "Whether one device of this process can reach the memory of another.");
  module.def("symmetric_memories", &symmetric_memories, "The buffers that this process shares with other ranks.");
#else
  module.attr("has_cuda") = false;
#endif
#ifdef MEGAMOE_TESTING
  module.attr("has_testing") = true;
  module.def("hold_sms", &hold_sms, py::arg("device"), py::arg("ctas"), py::arg("milliseconds"),
             "A kernel on a stream of its own that keeps so many SMs for so long; returns when it has them.");
#else
  module.attr("has_testing") = false;
#endif
  module.def("ffi_registrations", &ffi_registrations, "FFI types and targets, for jax.ffi to register.");
  module.def("host_identity", &megamoe::transport::host_identity,
             "The same in all processes on one running kernel, in containers too.");
  module.def("workspace_bytes", &workspace_bytes, py::arg("num_tokens"), py::arg("top_k"), py::arg("hidden_size"),
             py::arg("intermediate_size"), py::arg("num_local_experts"), py::arg("weight_format"),
             py::arg("batch_invariant"), "Bytes of scratch memory one call of the fused kernel needs on a device.");
  module.def("peer_workspace_bytes", &peer_workspace_bytes, py::arg("num_tokens"), py::arg("top_k"),
             py::arg("hidden_size"), py::arg("intermediate_size"), py::arg("num_local_experts"),
             py::arg("weight_format"), py::arg("batch_invariant"), py::arg("num_ranks"),
             "The same for one rank of an expert group, beside the buffer that it shares.");
  module.def("peer_buffer_bytes", &peer_buffer_bytes, py::arg("num_tokens"), py::arg("top_k"), py::arg("hidden_size"),
             py::arg("intermediate_size"), py::arg("num_local_experts"), py::arg("weight_format"),
             py::arg("batch_invariant"), py::arg("num_ranks"),
             "Bytes of the buffer that each rank of an expert group shares with the others.");
  module.def("launch_choice", &launch_choice, py::arg("num_tokens"), py::arg("top_k"), py::arg("hidden_size"),
             py::arg("intermediate_size"), py::arg("num_local_experts"), py::arg("weight_format"), py::arg("num_ranks"),
             py::kw_only(), py::arg("num_sms"), py::arg("bytes_per_microsecond"), py::arg("batch_invariant") = false,
             "What the largest launch of a call is like on a device with so many SMs and so fast a memory.");
}
