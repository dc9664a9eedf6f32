// XLA FFI handlers of the expert-parallel layer: the group's memory once, then one launch per call and rank.
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

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

constexpr uint32_t kMoeLayout = 0x6d6f6531;  // "moe1": the buffers of this version of layout/peer_buffer.h
static_assert(sizeof(PeerFailure) <= transport::SymmetricMemory::kNoteBytes);

std::string read_note(const void* note, int rank) { return failure_text(*static_cast<const PeerFailure*>(note), rank); }

ffi::ErrorOr<std::unique_ptr<MoePeersInstance>> instantiate() { return std::make_unique<MoePeersInstance>(); }

ffi::Error initialize(MoePeersInstance* instance, CollectivesContext collectives, int32_t ordinal, ffi::AnyBuffer x,
                      ffi::AnyBuffer gate_up, ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer down,
                      ffi::AnyBuffer down_scale, ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights,
                      ffi::AnyBuffer layer, ffi::Result<ffi::AnyBuffer> /*y*/, ffi::Result<ffi::AnyBuffer> /*load*/,
                      ffi::Result<ffi::AnyBuffer> /*workspace*/, ffi::Dictionary attributes) {
  ffi::ErrorOr<ReplicaGroups> groups = ReplicaGroups::parse(attributes);
  if (groups.has_error()) return std::move(groups).error();
  const MoeOperands operands{x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, layer};
  Problem problem;
  int num_layers = 1;
  ffi::Error error = read_problem(operands, groups.value().size(), &problem, &num_layers);
  if (error.failure()) return error;
  ffi::ErrorOr<int> device = ExpertGroup::cuda_device(collectives, groups.value());
  if (device.has_error()) return std::move(device).error();
  transport::DeviceScope scope(device.value());
  problem = per_launch(problem);
  error = instance->site.initialize(ordinal, device.value(), problem, GroupKind::kPeers);
  if (error.failure()) return error;
  // Last: see `ExpertGroup::initialize`.
  return instance->group.initialize(collectives, groups.value(), ordinal, PeerBuffer::bytes_for(problem), kMoeLayout,
                                    read_note);
}

ffi::Error execute(cudaStream_t stream, MoePeersInstance* instance, int32_t ordinal, ffi::AnyBuffer x,
                   ffi::AnyBuffer gate_up, ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer down, ffi::AnyBuffer down_scale,
                   ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights, ffi::AnyBuffer layer,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> load,
                   ffi::Result<ffi::AnyBuffer> workspace, ffi::Dictionary attributes) {
  const transport::SymmetricMemory* memory = instance->group.find(ordinal);
  const CallSite::Device* state = instance->site.find(ordinal);
  if (memory == nullptr || state == nullptr) {
    return ffi::Error::Internal("jax_megamoe.moe: the call was not initialised on this device.");
  }
  const auto clamp = attributes.get<float>("activation_clamp");
  const auto factor = attributes.get<float>("routed_scaling_factor");
  const auto limit = attributes.get<int64_t>("limit_microseconds");
  if (clamp.has_error() || factor.has_error() || limit.has_error() || limit.value() < 1) {
    return moe_failure("the call lacks activation_clamp, routed_scaling_factor or a positive limit_microseconds.");
  }
  auto* failure = static_cast<PeerFailure*>(memory->note());
  const std::string failed = memory->failure();
  if (!failed.empty()) return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, "jax_megamoe.moe: " + failed);

  const MoeOperands operands{x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, layer};
  MoeArguments arguments = {};
  ffi::Error error = read_problem(operands, memory->num_ranks(), &arguments.problem, &arguments.num_layers);
  if (error.failure()) return error;
  const Problem part = per_launch(arguments.problem);
  error = read_buffers(operands, {y, load, workspace}, Workspace::local_bytes(part), &arguments);
  if (error.failure()) return error;
  arguments.activation_clamp = clamp.value();
  arguments.routed_scaling_factor = factor.value();
  arguments.workspace.carve_local(part, workspace->untyped_data());
  arguments.control = state->control;
  arguments.counter_words = state->counter_words;
  std::vector<void*> mapped;
  for (int r = 0; r < memory->num_ranks(); ++r) mapped.push_back(memory->mapped(r));
  if (!join_peers(&arguments, part, memory->rank(), mapped.data(), memory->bytes(), failure, limit.value())) {
    return ffi::Error::Internal("jax_megamoe.moe: the group's buffer is too small for the call.");
  }
  const cudaError_t launched = launch_moe_peers(arguments, part.num_tokens, state->num_ctas, stream);
  if (launched != cudaSuccess) return moe_cuda_failure("the launch", launched);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoePeersInstantiate, instantiate, ffi::Ffi::BindInstantiate());

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoePeersPrepare, request_communicator,
                              ffi::Ffi::BindPrepare().Ctx<ffi::Extension<Collectives>>().Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoePeersInitialize, initialize,
                              bind_buffers(ffi::Ffi::BindInitialize()
                                               .Ctx<ffi::State<MoePeersInstance>>()
                                               .Ctx<ffi::Extension<Collectives>>()
                                               .Ctx<ffi::DeviceOrdinal>())
                                  .Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoePeersExecute, execute,
                              bind_buffers(ffi::Ffi::Bind()
                                               .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                               .Ctx<ffi::State<MoePeersInstance>>()
                                               .Ctx<ffi::DeviceOrdinal>())
                                  .Attrs(),
                              {ffi::Traits::kCmdBufferCompatible});

void* moe_peers_instance_type_id() { return &MoePeersInstance::id; }
void* moe_peers_instance_type_info() { return &MoePeersInstance::info; }

}  // namespace megamoe
