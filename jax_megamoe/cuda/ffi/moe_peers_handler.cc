// XLA FFI handlers of the expert-parallel layer: the group's memory once, then one launch per call and rank.
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "ffi/attributes.h"
#include "ffi/expert_group.h"
#include "ffi/handlers.h"
#include "ffi/moe_call.h"
#include "host/peers.h"

namespace megamoe {

class MoePeersInstance {
 public:
  static ffi::TypeId id;
  static ffi::TypeInfo info;
  CallSite site;
  ExpertGroup group;
};

ffi::TypeId MoePeersInstance::id = {};
ffi::TypeInfo MoePeersInstance::info = ffi::MakeTypeInfo<MoePeersInstance>();

namespace {

void write_view(void* image, void* const* mapped, int /*rank*/, int num_ranks, uint64_t bytes) {
  *static_cast<PeerView*>(image) = PeerBuffer::view(mapped, num_ranks, bytes);
}

// "moe2": the buffers of this version of layout/peer_buffer.h.
constexpr transport::Layout kMoeLayout = {0x6d6f6532, sizeof(PeerView), write_view, failure_text};

ffi::ErrorOr<std::unique_ptr<MoePeersInstance>> instantiate() { return std::make_unique<MoePeersInstance>(); }

// What a call says beside its operands.
struct Options {
  float activation_clamp, routed_scaling_factor;
  int64_t timeout_microseconds, setup_timeout_microseconds, call_id;

  static ffi::ErrorOr<Options> parse(const ffi::Dictionary& attributes) {
    Options options = {};
    const std::string missing =
        read_integers(attributes, {{"timeout_microseconds", &options.timeout_microseconds},
                                   {"setup_timeout_microseconds", &options.setup_timeout_microseconds},
                                   {"call_id", &options.call_id}});
    if (!missing.empty()) return moe_failure(missing);
    const auto clamp = attributes.get<float>("activation_clamp");
    const auto factor = attributes.get<float>("routed_scaling_factor");
    if (clamp.has_error() || factor.has_error()) {
      return moe_failure("the call lacks the attribute activation_clamp or routed_scaling_factor.");
    }
    // Far below what would overflow as nanoseconds, several times.
    constexpr int64_t kMostMicroseconds = int64_t{1} << 40;
    for (int64_t timeout : {options.timeout_microseconds, options.setup_timeout_microseconds}) {
      if (timeout < 1 || timeout > kMostMicroseconds) {
        return moe_failure("a timeout is " + std::to_string(timeout) + " us; wanted 1 to 2^40.");
      }
    }
    options.activation_clamp = clamp.value();
    options.routed_scaling_factor = factor.value();
    return options;
  }
};

ffi::Error initialize(MoePeersInstance* instance, CollectivesContext collectives, ffi::RunId run, int32_t ordinal,
                      ffi::AnyBuffer x, ffi::AnyBuffer gate_up, ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer down,
                      ffi::AnyBuffer down_scale, ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights,
                      ffi::AnyBuffer layer, ffi::AnyBuffer /*mesh_rank*/, ffi::Result<ffi::AnyBuffer> /*y*/,
                      ffi::Result<ffi::AnyBuffer> /*load*/, ffi::Result<ffi::AnyBuffer> /*workspace*/,
                      ffi::Dictionary attributes) {
  ffi::ErrorOr<ReplicaGroups> groups = ReplicaGroups::parse(attributes);
  if (groups.has_error()) return std::move(groups).error();
  ffi::ErrorOr<Options> options = Options::parse(attributes);
  if (options.has_error()) return std::move(options).error();
  const MoeOperands operands{x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, layer};
  Problem problem;
  int num_layers = 1;
  ffi::Error error = read_problem(operands, groups.value().size(), &problem, &num_layers);
  if (error.failure()) return error;
  ffi::ErrorOr<int> device = ExpertGroup::cuda_device(collectives, groups.value());
  if (device.has_error()) return std::move(device).error();
  problem = per_launch(problem);
  error = instance->site.initialize(ordinal, device.value(), problem, GroupKind::kPeers);
  if (error.failure()) return error;
  // Last: see `ExpertGroup::initialize`.
  return instance->group.initialize(collectives, groups.value(), ordinal, run, PeerBuffer::bytes_for(problem),
                                    kMoeLayout, options.value().setup_timeout_microseconds * 1e-6);
}

ffi::Error execute(cudaStream_t stream, MoePeersInstance* instance, int32_t ordinal, ffi::AnyBuffer x,
                   ffi::AnyBuffer gate_up, ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer down, ffi::AnyBuffer down_scale,
                   ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights, ffi::AnyBuffer layer, ffi::AnyBuffer mesh_rank,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> load,
                   ffi::Result<ffi::AnyBuffer> workspace, ffi::Dictionary attributes) {
  const transport::Member* member = instance->group.find(ordinal);
  const CallSite::Device* state = instance->site.find(ordinal);
  if (member == nullptr || state == nullptr) {
    return ffi::Error::Internal("jax_megamoe.moe: the call was not initialised on this device.");
  }
  ffi::ErrorOr<Options> parsed = Options::parse(attributes);
  if (parsed.has_error()) return std::move(parsed).error();
  const Options& options = parsed.value();
  if (mesh_rank.element_type() != ffi::S32 || mesh_rank.element_count() != 1) {
    return moe_failure("mesh_rank has another type than int32[].");
  }
  const MoeOperands operands{x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, layer};
  MoeArguments arguments = {};
  ffi::Error error = read_problem(operands, member->num_ranks(), &arguments.problem, &arguments.num_layers);
  if (error.failure()) return error;
  const Problem part = per_launch(arguments.problem);
  error = read_buffers(operands, {y, load, workspace}, Workspace::local_bytes(part), &arguments);
  if (error.failure()) return error;
  if (!PeerBuffer::holds(member->bytes(), part)) {
    return ffi::Error::Internal("jax_megamoe.moe: the group's buffer is too small for the call.");
  }
  arguments.activation_clamp = options.activation_clamp;
  arguments.routed_scaling_factor = options.routed_scaling_factor;
  arguments.workspace.carve_local(part, workspace->untyped_data());
  arguments.control = state->control;
  arguments.counter_words = state->counter_words;
  const PeerTimeouts timeouts{static_cast<uint64_t>(options.timeout_microseconds),
                              static_cast<uint64_t>(options.setup_timeout_microseconds)};
  join_peers(&arguments, part, member->rank(), static_cast<PeerView*>(member->view()), member->note(), timeouts,
             static_cast<uint32_t>(options.call_id));
  arguments.peers.mesh_rank = static_cast<const int32_t*>(mesh_rank.untyped_data());
  const cudaError_t launched = launch_moe_peers(arguments, part.num_tokens, state->num_ctas, stream);
  if (launched != cudaSuccess) return moe_cuda_failure("the launch", launched);
  return ffi::Error::Success();
}

// As `bind_buffers`, with the place in the mesh after the operands of one device.
template <typename Binding>
auto bind_peer_buffers(Binding&& binding) {
  return bind_results(bind_operands(std::forward<Binding>(binding)).template Arg<ffi::AnyBuffer>());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoePeersInstantiate, instantiate, ffi::Ffi::BindInstantiate());

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoePeersPrepare, request_communicator,
                              ffi::Ffi::BindPrepare().Ctx<ffi::Extension<Collectives>>().Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoePeersInitialize, initialize,
                              bind_peer_buffers(ffi::Ffi::BindInitialize()
                                                    .Ctx<ffi::State<MoePeersInstance>>()
                                                    .Ctx<ffi::Extension<Collectives>>()
                                                    .Ctx<ffi::RunId>()
                                                    .Ctx<ffi::DeviceOrdinal>())
                                  .Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoePeersExecute, execute,
                              bind_peer_buffers(ffi::Ffi::Bind()
                                                    .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                                    .Ctx<ffi::State<MoePeersInstance>>()
                                                    .Ctx<ffi::DeviceOrdinal>())
                                  .Attrs(),
                              {ffi::Traits::kCmdBufferCompatible});

void* moe_peers_instance_type_id() { return &MoePeersInstance::id; }
void* moe_peers_instance_type_info() { return &MoePeersInstance::info; }

}  // namespace megamoe
