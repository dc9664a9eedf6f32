#include "fake_launches.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <memory>

#include "diagnostics/wire_test.h"
#include "host/launch.h"
#include "layout/weights.h"
#include "layout/workspace.h"
#include "router/route.h"
#include "transport/registry.h"

namespace {

using fakes::launched;
using fakes::overrun;

void touch(const char* name, const void* pointer, __uint128_t bytes) {
  const auto found = fakes::bytes_at.find(reinterpret_cast<uint64_t>(pointer));
  const bool fits = found != fakes::bytes_at.end() && bytes <= found->second;
  if (!fits && bytes > 0) overrun += std::string(overrun.empty() ? "" : ", ") + name;
}

void want(const char* name, bool fits) {
  if (!fits) overrun += std::string(overrun.empty() ? "" : ", ") + name;
}

// The group's: a view of the peers, a note, and what each rank shares.
constexpr uint64_t kView = fakes::kNowhere * 3;
uint64_t note;
uint64_t group_bytes;

}  // namespace

namespace megamoe::transport {

std::string place_of(Communicator communicator, Place* place) {
  place->num_ranks = static_cast<fakes::Communicator*>(communicator)->num_ranks;
  place->rank = place->num_ranks - 1;
  return {};
}

// A group that is set up at once, with no more memory than it was asked for. The test is compiled without access
// control.
Result Registry::enter(const Request& request, std::shared_ptr<const Member>* member) {
  Place place;
  place_of(request.communicator, &place);
  auto* bootstrap = new Bootstrap(request.communicator, place);
  auto made = std::make_shared<Member>(*bootstrap, *request.layout, request.wanted);
  made->view_ = reinterpret_cast<void*>(kView);
  made->note_ = &note;
  made->buffer_.bytes_ = group_bytes = request.bytes;
  fakes::bytes_at[kView] = request.layout->view_bytes;
  *member = made;
  return {State::kOk, {}};
}

Registry& Registry::get() {
  alignas(Registry) static char memory[sizeof(Registry)];  // nobody looks into it
  return *reinterpret_cast<Registry*>(memory);
}

Member::~Member() {}
Mailbox::~Mailbox() {}

}  // namespace megamoe::transport

namespace megamoe {

cudaError_t prepare_moe(WeightFormat) { return cudaSuccess; }
cudaError_t prepare_moe_peers(WeightFormat) { return cudaSuccess; }
cudaError_t prepare_wire_test() { return cudaSuccess; }

namespace {

// What any launch of the layer touches follows from the problem alone.
void touch_operands(const MoeArguments& a) {
  launched = true;
  const Problem& p = a.problem;
  const __uint128_t tokens = p.num_tokens, slots = tokens * p.top_k;
  touch("x", a.x, tokens * p.hidden_size * 2);
  touch("y", a.y, tokens * p.hidden_size * (a.y_is_f32 ? 4 : 2));
  touch("topk_ids", a.topk_ids, slots * 4);
  touch("topk_weights", a.topk_weights, slots * 4);
  touch("layer", a.layer, 4);
  touch("load", a.load, __uint128_t{4} * p.num_local_experts);
  const auto leaves = weight_leaves(p.format, p.hidden_size, p.intermediate_size);
  const __uint128_t routed = p.num_local_experts - p.num_shared_experts, layers = a.num_layers;
  for (int i = 0; i < kNumLeaves; ++i) {
    __uint128_t bytes = leaves[i].element == Element::kF32 ? 4 : 1;
    for (int64_t size : leaves[i].dims) bytes *= static_cast<uint64_t>(size);
    touch(leaves[i].name, a.weights.leaves()[i], bytes * routed * layers);
    if (p.num_shared_experts > 0) {
      touch("shared", a.shared_weights.leaves()[i], bytes * p.num_shared_experts * layers);
    }
  }
}

// The workspace is carved into parts, of which the first begins at its address.
template <typename Carve>
void touch_workspace(const Workspace& workspace, size_t wanted, const Carve& carve) {
  for (const auto& [address, bytes] : fakes::bytes_at) {
    Workspace carved = {};
    carve(&carved, reinterpret_cast<void*>(address));
    if (std::memcmp(&carved, &workspace, sizeof(carved)) == 0) return want("workspace", bytes >= wanted);
  }
  want("workspace", false);
}

Problem part_of(const MoeArguments& a, int tokens_per_launch) {
  Problem part = a.problem;
  part.num_tokens = tokens_per_launch;
  return part;
}

}  // namespace

cudaError_t launch_moe(const MoeArguments& a, int tokens_per_launch, int, cudaStream_t) {
  touch_operands(a);
  const Problem part = part_of(a, tokens_per_launch);
  touch_workspace(a.workspace, Workspace::bytes(part), [&](Workspace* w, void* base) { w->carve(part, base); });
  return cudaSuccess;
}

cudaError_t launch_moe_peers(const MoeArguments& a, int tokens_per_launch, int, cudaStream_t) {
  touch_operands(a);
  const Problem part = part_of(a, tokens_per_launch);
  touch_workspace(a.workspace, Workspace::local_bytes(part), [&](Workspace* w, void* base) {
    w->carve_local(part, base);
    w->carve_shared(part, nullptr);
  });
  const Peers& peers = a.peers;
  touch("view", peers.view, sizeof(PeerView));
  touch("mesh_rank", peers.mesh_rank, 4);
  want("note", peers.note == &note);
  want("shared buffer", PeerBuffer::holds(group_bytes, part));
  want("ranks", peers.num_ranks == a.problem.num_ranks && peers.rank >= 0 && peers.rank < peers.num_ranks &&
                    peers.num_ranks <= kMaxRanks);
  constexpr uint64_t kMostNanoseconds = (uint64_t{1} << 40) * 1000;
  want("timeouts", peers.timeout_nanoseconds > 0 && peers.timeout_nanoseconds <= peers.first_timeout_nanoseconds &&
                       peers.first_timeout_nanoseconds <= kMostNanoseconds);
  return cudaSuccess;
}

size_t wire_test_bytes(int num_ranks, int64_t bytes) { return 8192 + static_cast<size_t>(num_ranks) * bytes; }

cudaError_t launch_wire_test(const WireTestArguments& a, cudaStream_t) {
  launched = true;
  touch("peers", a.peers, a.num_ranks * sizeof(void*));
  touch("axis_index", a.axis_index, 4);
  touch("rows", a.rows, a.num_ranks * sizeof(WireTestRow));
  want("shared buffer", a.bytes >= 16 && a.bytes % 16 == 0 && wire_test_bytes(a.num_ranks, a.bytes) <= group_bytes);
  want("mode", a.mode >= WireTestMode::kVerify && a.mode <= WireTestMode::kPush);
  want("ranks", a.num_ranks <= kWireTestMaxRanks && a.rank >= 0 && a.rank < a.num_ranks && a.shift >= 0 &&
                    a.shift < a.num_ranks && a.mute >= -1 && a.mute < a.num_ranks);
  want("end", a.iterations > 0 && a.iterations < kWireTestMaxIterations && a.timeout_nanoseconds > 0 &&
                  a.timeout_nanoseconds <= (uint64_t{1} << 40) * 1000);
  return cudaSuccess;
}

cudaError_t launch_route(const RouteArguments& a, cudaStream_t) {
  launched = true;
  const __uint128_t tokens = a.num_tokens;
  touch("logits", a.logits, tokens * a.num_experts * 4);
  touch("ids", a.ids, tokens * a.top_k * 4);
  touch("weights", a.weights, tokens * a.top_k * 4);
  if (a.bias != nullptr) touch("bias", a.bias, __uint128_t{4} * a.num_experts);
  return cudaSuccess;
}

}  // namespace megamoe
