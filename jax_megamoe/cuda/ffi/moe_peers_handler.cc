// XLA FFI handlers of the expert-parallel layer: the group's memory once, then one launch per call and rank.
#include <cstdint>
#include <string>
#include <utility>

#include "ffi/attributes.h"
#include "ffi/call_site.h"
#include "ffi/errors.h"
#include "ffi/expert_group.h"
#include "ffi/handlers.h"
#include "ffi/moe_call.h"
#include "host/peers.h"

namespace megamoe {

namespace {

struct MoePeersInstance : InstanceState<MoePeersInstance> {
  CallSite site;
  ExpertGroup group;
};

void write_view(void* image, void* const* mapped, int /*rank*/, int num_ranks, uint64_t bytes) {
  *static_cast<PeerView*>(image) = PeerBuffer::view(mapped, num_ranks, bytes);
}

// "moe4": the buffers of this version of layout/peer_buffer.h.
constexpr transport::Layout kMoeLayout = {0x6d6f6534, sizeof(PeerView), write_view, failure_text};

// What a call says beside its operands and the numerics.
struct Options {
  int64_t timeout_microseconds, setup_timeout_microseconds, call_id;

  static ffi::ErrorOr<Options> parse(const ffi::Dictionary& attributes) {
    Options options = {};
    const std::string missing =
        read_integers(attributes, {{"timeout_microseconds", &options.timeout_microseconds},
                                   {"setup_timeout_microseconds", &options.setup_timeout_microseconds},
                                   {"call_id", &options.call_id}});
    if (!missing.empty()) return moe_failure(missing);
    // Far below what would overflow as nanoseconds, several times.
    constexpr int64_t kMostMicroseconds = int64_t{1} << 40;
    for (int64_t timeout : {options.timeout_microseconds, options.setup_timeout_microseconds}) {
      if (timeout < 1 || timeout > kMostMicroseconds) {
        return moe_failure("a timeout is " + std::to_string(timeout) + " us; wanted 1 to 2^40.");
      }
    }
    return options;
  }
};

// The operand after the layer's: the rank's place in the mesh, int32[].
constexpr int kMore = 1;

ffi::Error initialize(MoePeersInstance* instance, CollectivesContext collectives, ffi::RunId run, int32_t ordinal,
                      ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes) {
  ffi::ErrorOr<ReplicaGroups> groups = ReplicaGroups::parse(attributes);
  if (groups.has_error()) return std::move(groups).error();
  ffi::ErrorOr<Options> options = Options::parse(attributes);
  if (options.has_error()) return std::move(options).error();
  ffi::ErrorOr<MoeCall> call = MoeCall::parse(args, rets, attributes, groups.value().size(), kMore);
  if (call.has_error()) return std::move(call).error();
  ffi::ErrorOr<int> device = ExpertGroup::cuda_device(collectives, groups.value());
  if (device.has_error()) return std::move(device).error();
  const Problem part = per_launch(call.value().problem());
  ffi::Error error = instance->site.initialize(ordinal, device.value(), part, prepare_moe_peers);
  if (error.failure()) return error;
  // Last: see `ExpertGroup::initialize`.
  return instance->group.initialize(collectives, groups.value(), ordinal, run, PeerBuffer::bytes_for(part), kMoeLayout,
                                    options.value().setup_timeout_microseconds * 1e-6);
}

ffi::Error execute(cudaStream_t stream, MoePeersInstance* instance, int32_t ordinal, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary attributes) {
  const transport::Member* member = instance->group.find(ordinal);
  const CallSite::Device* state = instance->site.find(ordinal);
  if (member == nullptr || state == nullptr) {
    return ffi::Error::Internal("jax_megamoe.moe: the call was not initialised on this device.");
  }
  ffi::ErrorOr<Options> parsed = Options::parse(attributes);
  if (parsed.has_error()) return std::move(parsed).error();
  const Options& options = parsed.value();
  ffi::ErrorOr<MoeCall> call = MoeCall::parse(args, rets, attributes, member->num_ranks(), kMore);
  if (call.has_error()) return std::move(call).error();
  const ffi::AnyBuffer mesh_rank = call.value().more(0);
  if (mesh_rank.element_type() != ffi::S32 || mesh_rank.element_count() != 1) {
    return moe_failure("mesh_rank has another type than int32[].");
  }
  const Problem part = per_launch(call.value().problem());
  MoeArguments arguments = {};
  ffi::Error error = call.value().fill(attributes, Workspace::local_bytes(part), &arguments);
  if (error.failure()) return error;
  if (!PeerBuffer::holds(member->bytes(), part)) {
    return ffi::Error::Internal("jax_megamoe.moe: the group's buffer is too small for the call.");
  }
  arguments.workspace.carve_local(part, call.value().workspace());
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

}  // namespace

Target moe_peers_target() {
  XLA_FFI_DEFINE_HANDLER(kPrepare, request_communicator, ffi::Ffi::BindPrepare().Ctx<Collectives>().Attrs());
  XLA_FFI_DEFINE_HANDLER(kInitialize, initialize,
                         ffi::Ffi::BindInitialize()
                             .Ctx<ffi::State<MoePeersInstance>>()
                             .Ctx<Collectives>()
                             .Ctx<ffi::RunId>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attrs());
  XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::PlatformStream<cudaStream_t>>()
                             .Ctx<ffi::State<MoePeersInstance>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attrs(),
                         {ffi::Traits::kCmdBufferCompatible});
  return target_with_state<MoePeersInstance>(
      "jax_megamoe.moe_peers.v3", "jax_megamoe.moe_peers_instance.v1",
      {{"prepare", kPrepare}, {"initialize", kInitialize}, {"execute", kExecute}});
}

}  // namespace megamoe
