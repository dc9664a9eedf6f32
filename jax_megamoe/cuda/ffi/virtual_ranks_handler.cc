// For tests: the ranks of a group on one GPU, each with a part of its SMs. Operands and results are those of the one-device
// call over all tokens and experts, so that the two compare bit by bit.
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ffi/attributes.h"
#include "ffi/handlers.h"
#include "ffi/moe_call.h"
#include "host/peers.h"

namespace megamoe {

class VirtualRanksInstance {
 public:
  static ffi::TypeId id;
  static ffi::TypeInfo info;

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

ffi::TypeId VirtualRanksInstance::id = {};
ffi::TypeInfo VirtualRanksInstance::info = ffi::MakeTypeInfo<VirtualRanksInstance>();

namespace {

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
  if (p->num_tokens % num_ranks != 0 || p->num_local_experts % num_ranks != 0) {
    return moe_failure("the ranks don't divide the tokens and the experts.");
  }
  p->num_tokens /= num_ranks;
  p->num_local_experts /= num_ranks;
  p->num_ranks = num_ranks;
  const std::string reason = unsupported_reason(*p);
  return reason.empty() ? ffi::Error::Success() : moe_failure(reason);
}

ffi::ErrorOr<std::unique_ptr<VirtualRanksInstance>> instantiate() { return std::make_unique<VirtualRanksInstance>(); }

ffi::Error initialize(VirtualRanksInstance* instance, int32_t device, ffi::AnyBuffer x, ffi::AnyBuffer gate_up,
                      ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer down, ffi::AnyBuffer down_scale,
                      ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights, ffi::AnyBuffer layer,
                      ffi::Result<ffi::AnyBuffer> /*y*/, ffi::Result<ffi::AnyBuffer> /*load*/,
                      ffi::Result<ffi::AnyBuffer> /*workspace*/, ffi::Dictionary attributes) {
  if (!instance->buffers.empty()) return ffi::Error::Success();
  ffi::ErrorOr<Options> options = Options::parse(attributes);
  if (options.has_error()) return std::move(options).error();
  const MoeOperands operands{x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, layer};
  Problem problem;
  int num_layers = 1;
  ffi::Error error = read_problem(operands, 1, &problem, &num_layers);
  if (error.failure()) return error;
  const int num_ranks = static_cast<int>(options.value().num_ranks);
  error = share_of_rank(num_ranks, &problem);
  if (error.failure()) return error;
  const size_t bytes = PeerBuffer::bytes_for(problem);
  cudaError_t status =
      cudaHostAlloc(reinterpret_cast<void**>(&instance->notes), num_ranks * sizeof(uint64_t), cudaHostAllocPortable);
  if (status != cudaSuccess) return moe_cuda_failure("allocating the notes", status);
  for (int r = 0; r < num_ranks; ++r) {
    instance->notes[r] = 0;
    instance->sites.push_back(std::make_unique<CallSite>());
    error = instance->sites.back()->initialize(device, device, problem, GroupKind::kVirtualRanks);
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

ffi::Error execute(cudaStream_t stream, VirtualRanksInstance* instance, int32_t device, ffi::AnyBuffer x,
                   ffi::AnyBuffer gate_up, ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer down, ffi::AnyBuffer down_scale,
                   ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights, ffi::AnyBuffer layer,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> load,
                   ffi::Result<ffi::AnyBuffer> workspace, ffi::Dictionary attributes) {
  ffi::ErrorOr<Options> parsed = Options::parse(attributes);
  if (parsed.has_error()) return std::move(parsed).error();
  const Options& options = parsed.value();
  const int num_ranks = static_cast<int>(options.num_ranks);
  if (static_cast<int>(instance->buffers.size()) != num_ranks) return moe_failure("the call was not initialised.");
  for (int r = 0; r < num_ranks; ++r) {
    const std::string failed = failure_text(*const_cast<const volatile uint64_t*>(instance->notes + r), r);
    if (!failed.empty()) return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, "jax_megamoe.moe: " + failed);
  }
  const MoeOperands operands{x, gate_up, gate_up_scale, down, down_scale, topk_ids, topk_weights, layer};
  MoeArguments all = {};
  ffi::Error error = read_problem(operands, 1, &all.problem, &all.num_layers);
  if (error.failure()) return error;
  Problem p = all.problem;
  error = share_of_rank(num_ranks, &p);
  if (error.failure()) return error;
  const size_t scratch = Workspace::local_bytes(p);
  error = read_buffers(operands, {y, load, workspace}, num_ranks * scratch, &all);
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
    one.activation_clamp = attributes.get<float>("activation_clamp").value();
    one.routed_scaling_factor = attributes.get<float>("routed_scaling_factor").value();
    one.workspace.carve_local(p, static_cast<char*>(workspace->untyped_data()) + r * scratch);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(VirtualRanksInstantiate, instantiate, ffi::Ffi::BindInstantiate());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    VirtualRanksInitialize, initialize,
    bind_buffers(ffi::Ffi::BindInitialize().Ctx<ffi::State<VirtualRanksInstance>>().Ctx<ffi::DeviceOrdinal>()).Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(VirtualRanksExecute, execute,
                              bind_buffers(ffi::Ffi::Bind()
                                               .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                               .Ctx<ffi::State<VirtualRanksInstance>>()
                                               .Ctx<ffi::DeviceOrdinal>())
                                  .Attrs(),
                              {ffi::Traits::kCmdBufferCompatible});

void* virtual_ranks_instance_type_id() { return &VirtualRanksInstance::id; }
void* virtual_ranks_instance_type_info() { return &VirtualRanksInstance::info; }

}  // namespace megamoe
