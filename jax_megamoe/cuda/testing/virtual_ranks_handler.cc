// For tests: the ranks of a group on one GPU, each with a part of its SMs. Operands and results are those of the
// one-device call over all tokens and experts, so that the two compare bit by bit.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ffi/attributes.h"
#include "ffi/call_site.h"
#include "ffi/errors.h"
#include "ffi/moe_call.h"
#include "host/peers.h"
#include "testing/targets.h"
#include "testing/virtual_ranks.h"

namespace megamoe {

namespace {

struct VirtualRanksInstance : InstanceState<VirtualRanksInstance> {
  ~VirtualRanksInstance() {
    for (void* buffer : buffers) cudaFree(buffer);
    cudaFree(views);
    cudaFreeHost(notes);
  }

  std::vector<std::unique_ptr<CallSite>> sites;  // by rank
  std::vector<void*> buffers;                    // by rank
  PeerView* views = nullptr;                     // by rank
  uint64_t* notes = nullptr;                     // by rank, in host memory
};

struct Options {
  int64_t num_ranks, present, ctas_per_rank, delay_seed, timeout_microseconds;
  int64_t odd_rank;   // is in another call, as far as the others can tell; -1: none is
  int64_t late_ctas;  // of each rank, begin when the others are through

  static ffi::ErrorOr<Options> parse(const ffi::Dictionary& attributes) {
    Options options = {};
    const std::string missing = read_integers(attributes, {{"num_ranks", &options.num_ranks},
                                                           {"present", &options.present},
                                                           {"ctas_per_rank", &options.ctas_per_rank},
                                                           {"delay_seed", &options.delay_seed},
                                                           {"timeout_microseconds", &options.timeout_microseconds},
                                                           {"odd_rank", &options.odd_rank},
                                                           {"late_ctas", &options.late_ctas}});
    if (!missing.empty()) return moe_failure(missing);
    if (options.num_ranks < 1 || options.num_ranks > kMaxVirtualRanks || options.present < 1 ||
        options.present > options.num_ranks || options.ctas_per_rank < 1 || options.timeout_microseconds < 1 ||
        options.late_ctas < 0 || options.late_ctas >= options.ctas_per_rank) {
      return moe_failure("num_ranks, present, ctas_per_rank, late_ctas or timeout_microseconds is out of range.");
    }
    return options;
  }
};

// The problem of each rank, from that of all.
ffi::Error share_of_rank(int num_ranks, Problem* p) {
  if (p->num_shared_experts != 0) return moe_failure("virtual ranks have no shared experts.");
  if (p->num_tokens % num_ranks != 0 || p->num_local_experts % num_ranks != 0) {
    return moe_failure("the ranks don't divide the tokens and the experts.");
  }
  p->num_tokens /= num_ranks;
  p->num_local_experts /= num_ranks;
  p->num_ranks = num_ranks;
  const std::string reason = unsupported_reason(*p);
  return reason.empty() ? ffi::Error::Success() : moe_failure(reason);
}

ffi::Error initialize(VirtualRanksInstance* instance, int32_t device, ffi::RemainingArgs args, ffi::RemainingRets rets,
                      ffi::Dictionary attributes) {
  if (!instance->buffers.empty()) return ffi::Error::Success();
  ffi::ErrorOr<Options> options = Options::parse(attributes);
  if (options.has_error()) return std::move(options).error();
  ffi::ErrorOr<MoeCall> call = MoeCall::parse(args, rets, attributes, 1);
  if (call.has_error()) return std::move(call).error();
  Problem problem = call.value().problem();
  const int num_ranks = static_cast<int>(options.value().num_ranks);
  ffi::Error error = share_of_rank(num_ranks, &problem);
  if (error.failure()) return error;
  const size_t bytes = PeerBuffer::bytes_for(problem);
  cudaError_t status =
      cudaHostAlloc(reinterpret_cast<void**>(&instance->notes), num_ranks * sizeof(uint64_t), cudaHostAllocPortable);
  if (status != cudaSuccess) return moe_cuda_failure("allocating the notes", status);
  for (int r = 0; r < num_ranks; ++r) {
    instance->notes[r] = 0;
    instance->sites.push_back(std::make_unique<CallSite>());
    error = instance->sites.back()->initialize(device, device, problem, prepare_virtual_ranks);
    if (error.failure()) return error;
    instance->buffers.push_back(nullptr);
    status = cudaMalloc(&instance->buffers.back(), bytes);
    if (status == cudaSuccess) status = cudaMemset(instance->buffers.back(), 0, bytes);
    if (status != cudaSuccess) return moe_cuda_failure("allocating the ranks' buffers", status);
  }
  const std::vector<PeerView> views(num_ranks, PeerBuffer::view(instance->buffers.data(), num_ranks, bytes));
  status = cudaMalloc(reinterpret_cast<void**>(&instance->views), num_ranks * sizeof(PeerView));
  if (status == cudaSuccess) {
    status = cudaMemcpy(instance->views, views.data(), num_ranks * sizeof(PeerView), cudaMemcpyHostToDevice);
  }
  if (status == cudaSuccess) status = cudaDeviceSynchronize();
  return status == cudaSuccess ? ffi::Error::Success() : moe_cuda_failure("telling the ranks of their buffers", status);
}

ffi::Error execute(cudaStream_t stream, VirtualRanksInstance* instance, int32_t device, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary attributes) {
  ffi::ErrorOr<Options> parsed = Options::parse(attributes);
  if (parsed.has_error()) return std::move(parsed).error();
  const Options& options = parsed.value();
  const int num_ranks = static_cast<int>(options.num_ranks);
  if (static_cast<int>(instance->buffers.size()) != num_ranks) return moe_failure("the call was not initialised.");
  for (int r = 0; r < num_ranks; ++r) {
    const std::string failed = failure_text(*const_cast<const volatile uint64_t*>(instance->notes + r), r);
    if (!failed.empty()) return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, "jax_megamoe.moe: " + failed);
  }
  ffi::ErrorOr<MoeCall> call = MoeCall::parse(args, rets, attributes, 1);
  if (call.has_error()) return std::move(call).error();
  Problem p = call.value().problem();
  ffi::Error error = share_of_rank(num_ranks, &p);
  if (error.failure()) return error;
  const size_t scratch = Workspace::local_bytes(p);
  MoeArguments all = {};
  error = call.value().fill(attributes, num_ranks * scratch, &all);
  if (error.failure()) return error;
  // Of each rank at least one CTA has to find an SM; they start rank by rank.
  if (all.num_layers != 1 || all.y_is_f32 ||
      (num_ranks - 1) * options.ctas_per_rank >= instance->sites[0]->find(device)->num_ctas) {
    return moe_failure("stacked layers, a float32 result, or more CTAs than leave an SM to the last rank.");
  }
  VirtualRanksArguments arguments = {};
  for (int r = 0; r < num_ranks; ++r) {
    MoeArguments& one = arguments.of_rank[r];
    one = all;
    one.problem = p;
    take_tokens_of_rank(&one, r);
    take_experts_of_rank(&one, r);
    one.load += static_cast<size_t>(r) * p.num_local_experts;
    one.workspace.carve_local(p, static_cast<char*>(call.value().workspace()) + r * scratch);
    one.control = instance->sites[r]->find(device)->control;
    one.counter_words = instance->sites[r]->find(device)->counter_words;
    const uint64_t timeout = static_cast<uint64_t>(options.timeout_microseconds);
    join_peers(&one, p, r, instance->views + r, instance->notes + r, {timeout, timeout}, r == options.odd_rank ? 1 : 0);
    one.peers.delay_seed = static_cast<uint32_t>(options.delay_seed);
    one.peers.late_ctas = static_cast<int>(options.late_ctas);
  }
  const cudaError_t launched = launch_virtual_ranks(arguments, static_cast<int>(options.present),
                                                    static_cast<int>(options.ctas_per_rank), stream);
  return launched == cudaSuccess ? ffi::Error::Success() : moe_cuda_failure("the launch", launched);
}

}  // namespace

Target virtual_ranks_target() {
  XLA_FFI_DEFINE_HANDLER(kInitialize, initialize,
                         ffi::Ffi::BindInitialize()
                             .Ctx<ffi::State<VirtualRanksInstance>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attrs());
  XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::PlatformStream<cudaStream_t>>()
                             .Ctx<ffi::State<VirtualRanksInstance>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attrs(),
                         {ffi::Traits::kCmdBufferCompatible});
  return target_with_state<VirtualRanksInstance>("jax_megamoe.virtual_ranks.v1",
                                                 "jax_megamoe.virtual_ranks_instance.v1",
                                                 {{"initialize", kInitialize}, {"execute", kExecute}});
}

}  // namespace megamoe
