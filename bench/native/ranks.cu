// Development program for the fused kernel among ranks, without JAX.
//   ranks check H I E k T R [routing [launches [seed [ctas [late]]]]]  R ranks share this GPU (virtual ranks), T tokens each, against
//                                  one rank with all of them, bit by bit; a seed adds delays, `late` CTAs of each begin last
//   ranks missing H I E k T R      one of R virtual ranks stays away: the others have to end, and to say why; how long
//                                  each of their launches takes from then on
//   ranks time H I E k R T...      R GPUs of this host, in a graph of 12 calls each; R = 1: alone, through the same code
//   ranks virtual H I E k R T...   the same time with R virtual ranks
#include <cuda_runtime.h>

#include <cstdio>
#include <memory>

#include "calls.cuh"
#include "host/peers.h"
#include "testing/read_ceiling.h"
#include "testing/virtual_ranks.h"

namespace {

using namespace probe;
using megamoe::PeerBuffer;
using megamoe::PeerView;

// Under compute-sanitizer a launch takes long.
const uint64_t kTimeoutMicroseconds = (is_bare() ? 300 : 5) * uint64_t{1000 * 1000};

// The buffers and counters of R ranks, on one GPU or on one each.
struct Ranks {
  Problem problem;  // of each
  std::vector<int> devices;
  std::vector<void*> buffers, scratch;
  std::vector<megamoe::Control*> controls;
  std::vector<PeerView*> views;
  PeerView view;
  uint64_t* notes;
  size_t bytes;

  Ranks(const Problem& p, bool one_gpu) : problem(p), bytes(PeerBuffer::bytes_for(p)) {
    CHECK(cudaHostAlloc(reinterpret_cast<void**>(&notes), p.num_ranks * sizeof(uint64_t), cudaHostAllocPortable));
    std::memset(notes, 0, p.num_ranks * sizeof(uint64_t));
    for (int r = 0; r < p.num_ranks; ++r) {
      devices.push_back(one_gpu ? 0 : r);
      CHECK(cudaSetDevice(devices[r]));
      for (int other = 0; !one_gpu && other < p.num_ranks; ++other) {
        if (other != r) CHECK(cudaDeviceEnablePeerAccess(other, 0));
      }
      buffers.push_back(device_array<uint8_t>(bytes, "a rank's shared buffer"));
      scratch.push_back(device_array<uint8_t>(megamoe::Workspace::local_bytes(p), "a rank's own workspace"));
      controls.push_back(make_control(p));
      CHECK(cudaDeviceSynchronize());
    }
    view = PeerBuffer::view(buffers.data(), p.num_ranks, bytes);
    for (int r = 0; r < p.num_ranks; ++r) {
      CHECK(cudaSetDevice(devices[r]));
      CHECK(cudaMemset(buffers[r], 0, bytes - workspace_bytes(r)));  // ids and flags
      views.push_back(device_array<PeerView>(1, "a rank's view"));
      CHECK(cudaMemcpy(views[r], &view, sizeof(view), cudaMemcpyHostToDevice));
    }
    CHECK(cudaSetDevice(0));
  }

  ~Ranks() {
    for (size_t r = 0; r < buffers.size(); ++r) {
      cudaSetDevice(devices[r]);
      for (const void* own : {buffers[r], scratch[r], (void*)controls[r], (void*)views[r]}) device_free(own);
      for (int other = 0; devices.back() != 0 && other < static_cast<int>(buffers.size()); ++other) {
        if (other != devices[r]) cudaDeviceDisablePeerAccess(other);
      }
    }
    cudaSetDevice(0);
    cudaFreeHost(notes);
  }

  // Of what ranks share of their workspaces, behind ids and flags in rank r's buffer.
  size_t workspace_bytes(int r) const { return reinterpret_cast<uint64_t>(buffers[r]) + bytes - view.workspace[r]; }

  // While no rank is in a launch: NaN in all workspaces.
  void poison() {
    const Problem& p = problem;
    for (int r = 0; r < p.num_ranks; ++r) {
      void* const shared = reinterpret_cast<void*>(view.workspace[r]);
      if (is_bare()) {
        megamoe::Workspace workspace = {};
        workspace.carve_shared(p, shared);
        workspace.carve_local(p, scratch[r]);
        set_padding(p, workspace);
      } else {
        CHECK(cudaMemsetAsync(shared, 0xff, workspace_bytes(r), nullptr));
        CHECK(cudaMemsetAsync(scratch[r], 0xff, megamoe::Workspace::local_bytes(p), nullptr));
      }
    }
  }

  // Rank r's part of a call over all tokens and experts, or of one that has its tokens only.
  MoeArguments arguments(int r, const MoeArguments& call, const Weights& w, uint64_t timeout = kTimeoutMicroseconds) {
    const Problem& p = problem;
    MoeArguments a = call;
    a.problem = p;
    a.weights = {w.gate_up, w.gate_up_scale, w.down, w.down_scale};
    megamoe::take_experts_of_rank(&a, r);
    if (call.problem.num_tokens != p.num_tokens) {
      megamoe::take_tokens_of_rank(&a, r);
      a.load += static_cast<size_t>(r) * p.num_local_experts;
    }
    a.workspace.carve_local(p, scratch[r]);
    a.control = controls[r];
    a.counter_words = megamoe::CounterSet::words(p);
    megamoe::join_peers(&a, p, r, views[r], notes + r, {timeout, timeout}, 0);
    return a;
  }

  bool failed() const {
    bool any = false;
    for (int r = 0; r < problem.num_ranks; ++r) {
      const std::string text = megamoe::failure_text(notes[r], r);
      if (!text.empty()) std::printf("%s\n", text.c_str());
      any = any || !text.empty();
    }
    return any;
  }
};

megamoe::VirtualRanksArguments virtual_arguments(Ranks& ranks, const MoeArguments& call, const Weights& w,
                                                 uint32_t seed, uint64_t timeout = kTimeoutMicroseconds, int late = 0) {
  megamoe::VirtualRanksArguments all;
  for (int r = 0; r < ranks.problem.num_ranks; ++r) {
    all.of_rank[r] = ranks.arguments(r, call, w, timeout);
    all.of_rank[r].peers.delay_seed = seed;
    all.of_rank[r].peers.late_ctas = late;
  }
  return all;
}

int check(const Problem& p, const std::string& routing, int launches, uint32_t seed, int ctas, int late) {
  const Problem whole{
      p.num_tokens * p.num_ranks,     p.top_k, p.hidden_size, p.intermediate_size, p.num_local_experts * p.num_ranks, 1,
      megamoe::OperandOrder::kByRule, p.format};
  const Weights w(p.hidden_size, p.intermediate_size, whole.num_local_experts, p.format);
  constexpr int kCalls = 4;
  std::vector<Call> calls;
  std::vector<std::vector<float>> wanted;
  const size_t whole_bytes = megamoe::Workspace::bytes(whole);
  void* workspace = device_array<uint8_t>(whole_bytes, "the workspace of one rank");
  megamoe::Control* control = make_control(whole);
  for (int n = 0; n < kCalls; ++n) {
    calls.emplace_back(whole, w, n == 0 || launches == 1 ? routing : n == 1 ? "masked" : "uniform", 11 + n);
    calls.back().share(workspace, control);
    calls.back().poison(workspace, whole_bytes);
    CHECK(megamoe::launch_moe(calls.back().args, whole.num_tokens, num_sms(), nullptr));
    CHECK(cudaDeviceSynchronize());
    wanted.push_back(calls.back().result());
  }
  // Where the tiles differ, the bits do: see docs/kernel.md.
  const bool same_path = whole.swap_operands() == p.swap_operands();
  Ranks ranks(p, true);
  int wrong = 0;
  double worst = 0;
  for (int launch = 0; launch < launches; ++launch) {
    const Call& call = calls[launch % kCalls];
    if (launch % kCalls == 0) {  // of launches that follow each other without anything between them
      ranks.poison();
      for (const Call& each : calls) each.poison_results();
    }
    const auto all = virtual_arguments(ranks, call.args, w, seed == 0 ? 0 : seed + launch, kTimeoutMicroseconds, late);
    CHECK(megamoe::launch_virtual_ranks(all, p.num_ranks, ctas, nullptr));
    if (launch % kCalls != kCalls - 1 && launch != launches - 1) continue;
    CHECK(cudaDeviceSynchronize());
    if (!bands_are_whole()) ++wrong;
    for (int n = 0; n <= launch % kCalls; ++n) {
      const auto y = calls[n].result();
      const double diff = difference(wanted[n], y);
      worst = diff > worst ? diff : worst;
      const bool same = std::memcmp(wanted[n].data(), y.data(), y.size() * 4) == 0;
      if ((same_path ? !same : !(diff < 1e-4)) || !calls[n].load_is_right()) ++wrong;
    }
    if (wrong > 0 || ranks.failed()) break;
  }
  const bool good = wrong == 0 && !ranks.failed();
  std::printf("%-4s %d ranks of %d CTAs, H %d I %d E %d k %d T %d %s: %d launches, seed %u, diff %.2e, %s\n",
              good ? "ok" : "BAD", p.num_ranks, ctas, p.hidden_size, p.intermediate_size, whole.num_local_experts,
              p.top_k, p.num_tokens, routing.c_str(), launches, seed, worst, same_path ? "bitwise" : "other tiles");
  return good ? 0 : 1;
}

int missing(const Problem& p) {
  const Problem whole{
      p.num_tokens * p.num_ranks,     p.top_k, p.hidden_size, p.intermediate_size, p.num_local_experts * p.num_ranks, 1,
      megamoe::OperandOrder::kByRule, p.format};
  const Weights w(p.hidden_size, p.intermediate_size, whole.num_local_experts, p.format);
  Call call(whole, w, "uniform", 11);
  Ranks ranks(p, true);
  ranks.poison();
  CHECK(cudaMemset(call.args.y, 0, call.y_count * 2));
  const auto all = virtual_arguments(ranks, call.args, w, 0, 200 * 1000);
  CHECK(megamoe::launch_virtual_ranks(all, p.num_ranks - 1, num_sms() / p.num_ranks, nullptr));
  CHECK(cudaDeviceSynchronize());
  const auto y = call.result();
  const bool poisoned = std::isnan(y[0]) && std::isnan(y[y.size() / p.num_ranks - 1]);
  const bool good = ranks.failed() && poisoned && bands_are_whole();
  std::printf("%-4s a missing rank of %d: %s\n", good ? "ok" : "BAD", p.num_ranks, poisoned ? "NaN" : "NUMBERS");
  const double after = graph_microseconds([&](int, cudaStream_t stream) {
    CHECK(megamoe::launch_virtual_ranks(all, p.num_ranks - 1, num_sms() / p.num_ranks, stream));
  });
  std::printf("launches after that take %.1f us each\n", after);
  return good ? 0 : 1;
}

void time_shape(const Problem& one, const std::vector<int>& token_counts, bool one_gpu) {
  const int num_ranks = one.num_ranks;
  std::vector<std::unique_ptr<Weights>> weights;
  const int gpus = one_gpu ? 1 : num_ranks;
  for (int d = 0; d < gpus; ++d) {
    CHECK(cudaSetDevice(d));
    CHECK(one_gpu ? megamoe::prepare_virtual_ranks(one.format) : megamoe::prepare_moe_peers(one.format));
    weights.push_back(std::make_unique<Weights>(one.hidden_size, one.intermediate_size,
                                                one.num_local_experts * num_ranks, one.format));
  }
  for (int tokens : token_counts) {
    Problem p = one;
    p.num_tokens = tokens;
    Ranks ranks(p, one_gpu);
    Problem routed = p;  // ids of all experts of the group
    routed.num_local_experts = p.num_local_experts * num_ranks, routed.num_ranks = 1;
    if (one_gpu) routed.num_tokens *= num_ranks;
    std::vector<std::vector<Call>> calls(gpus);
    std::vector<std::vector<char>> hit(kInputs, std::vector<char>(routed.num_local_experts));
    std::vector<cudaStream_t> streams(gpus);
    std::vector<cudaGraphExec_t> graphs(gpus);
    std::vector<cudaEvent_t> starts(gpus), stops(gpus);
    for (int d = 0; d < gpus; ++d) {
      CHECK(cudaSetDevice(d));
      for (int n = 0; n < kInputs; ++n) {
        calls[d].emplace_back(routed, *weights[d], "uniform", 1000 * d + 100 + n);
        for (int id : calls[d].back().ids) hit[n][id] = 1;
      }
      CHECK(cudaStreamCreate(&streams[d]));
      CHECK(cudaEventCreate(&starts[d]));
      CHECK(cudaEventCreate(&stops[d]));
      CHECK(cudaStreamBeginCapture(streams[d], cudaStreamCaptureModeThreadLocal));
      for (int n = 0; n < kInputs; ++n) {
        if (one_gpu) {
          CHECK(megamoe::launch_virtual_ranks(virtual_arguments(ranks, calls[0][n].args, *weights[0], 0), num_ranks,
                                              num_sms() / num_ranks, streams[d]));
        } else {
          CHECK(megamoe::launch_moe_peers(ranks.arguments(d, calls[d][n].args, *weights[d]), tokens, num_sms(),
                                          streams[d]));
        }
      }
      cudaGraph_t graph;
      CHECK(cudaStreamEndCapture(streams[d], &graph));
      CHECK(cudaGraphInstantiate(&graphs[d], graph, 0));
      CHECK(cudaGraphUpload(graphs[d], streams[d]));
      CHECK(cudaStreamSynchronize(streams[d]));
    }
    // The unluckiest rank of each call, whose bytes every other one has to wait for.
    double touched = 0;
    for (const auto& experts : hit) {
      int most = 0;
      for (int r = 0; r < num_ranks; ++r) {
        int count = 0;
        for (int e = 0; e < p.num_local_experts; ++e) count += experts[r * p.num_local_experts + e];
        most = count > most ? count : most;
      }
      touched += most / static_cast<double>(kInputs);
    }
    std::vector<double> times;
    for (int repeat = 0; repeat < 25; ++repeat) {
      for (int d = 0; d < gpus; ++d) {
        CHECK(cudaSetDevice(d));
        CHECK(cudaEventRecord(starts[d], streams[d]));
        CHECK(cudaGraphLaunch(graphs[d], streams[d]));
        CHECK(cudaEventRecord(stops[d], streams[d]));
      }
      float most = 0;
      for (int d = 0; d < gpus; ++d) {
        float ms;
        CHECK(cudaSetDevice(d));
        CHECK(cudaStreamSynchronize(streams[d]));
        CHECK(cudaEventElapsedTime(&ms, starts[d], stops[d]));
        most = ms > most ? ms : most;
      }
      if (repeat >= 5) times.push_back(most * 1000.0 / kInputs);
    }
    std::sort(times.begin(), times.end());
    const double us = times[times.size() / 2];
    CHECK(cudaSetDevice(0));
    const auto leaves = megamoe::weight_leaves(p.format, p.hidden_size, p.intermediate_size);
    const size_t total = routed.num_local_experts * leaves[0].expert_bytes() / 4096 * 4096;
    const size_t bytes = static_cast<size_t>(touched * weights[0]->expert_bytes) / 4096 * 4096;
    uint32_t* sink = device_array<uint32_t>(1);
    const double ceiling = graph_microseconds([&](int n, cudaStream_t stream) {
      CHECK(megamoe::launch_read_ceiling(weights[0]->gate_up, total, static_cast<size_t>(n) * (total / kInputs), bytes,
                                         sink, num_sms(), stream));
    });
    std::printf("%d ranks%s, H %d I %d E %d k %d T %4d: touched %.1f, %7.1f us, ceiling %7.1f us, %.1f us beyond\n",
                num_ranks, one_gpu ? " on one GPU" : "", p.hidden_size, p.intermediate_size, routed.num_local_experts,
                p.top_k, tokens, touched, us, ceiling, us - ceiling);
    if (ranks.failed()) std::exit(1);
    std::fflush(stdout);
    for (int d = 0; d < gpus; ++d) {
      CHECK(cudaSetDevice(d));
      for (auto& c : calls[d]) {
        for (void* q : {(void*)c.args.x, (void*)c.args.topk_ids, (void*)c.args.topk_weights, c.args.y}) cudaFree(q);
      }
    }
    CHECK(cudaSetDevice(0));
    cudaFree(sink);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 8) {
    std::fprintf(stderr, "usage: ranks check|missing H I E k T R ... | ranks time|virtual H I E k R T...\n");
    return 2;
  }
  auto number = [&](int i, int otherwise = 0) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  const std::string what = argv[1];
  const megamoe::WeightFormat format = probe::weight_format();
  const int h = number(2), inter = number(3), experts = number(4), k = number(5);
  if (what == "time" || what == "virtual") {
    std::vector<int> tokens;
    for (int i = 7; i < argc; ++i) tokens.push_back(number(i));
    time_shape({1, k, h, inter, experts / number(6), number(6), megamoe::OperandOrder::kByRule, format}, tokens,
               what == "virtual");
    return 0;
  }
  CHECK(megamoe::prepare_moe(format));
  CHECK(megamoe::prepare_virtual_ranks(format));
  Guards bands;
  if (!is_bare()) guards = &bands;
  const Problem p{number(6), k, h, inter, experts / number(7), number(7), megamoe::OperandOrder::kByRule, format};
  if (what == "missing") return missing(p);
  return check(p, argc > 8 ? argv[8] : "uniform", number(9, 8), number(10), number(11, num_sms() / p.num_ranks / 2 * 2),
               number(12));
}
