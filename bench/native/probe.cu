// Development probe of the fused kernel without JAX: checks it against naive kernels and times it in a CUDA graph
// beside the device's read ceiling. Starts in a second, which makes it the program to run under compute-sanitizer.
//   probe check H I E k T [routing [ctas]]
//     between guard bands, over poisoned memory; routing: uniform, one (all on one expert), masked, none; more CTAs
//     than SMs start late
//   probe overrun H I E k T             results are made too small for the launch: the bands have to show it
//   probe time H I E k T...             per call in a graph of 12 calls with 12 inputs
//   probe turns H I E k T...            the same with the weights of two layers in turn
//   probe apart H I E k T...            ... and scratch of its own for each call, as a compiler may place it
//   probe crossover H I E k T...        both orientations, whichever the rule would choose
//   probe trace FILE H I E k T...       events of one launch, in a build with MEGAMOE_TRACE (build/probe_trace); read by show_trace.py
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "calls.cuh"
#include "kernels/trace.cuh"
#include "testing/read_ceiling.h"
#include "timing.h"

namespace {

using probe::bands_are_whole;
using probe::Call;
using probe::device_array;
using probe::device_free;
using probe::difference;
using probe::graph_microseconds;
using probe::kInputs;
using probe::make_control;
using probe::num_sms;
using probe::Problem;
using probe::weight_format;
using probe::Weights;

int check(const Problem& p, const std::string& routing, int ctas) {
  const Weights w(p.hidden_size, p.intermediate_size, p.num_local_experts, p.format);
  Call call(p, w, routing, 11);
  const size_t bytes = megamoe::Workspace::bytes(p);
  void* workspace = device_array<uint8_t>(bytes, "the workspace");
  call.share(workspace, make_control(p));
  std::vector<float> first;
  bool same = true, whole = true, counted = true;
  for (int launch = 0; launch < 3; ++launch) {
    call.poison(workspace, bytes);
    CHECK(megamoe::launch_moe(call.args, call.args.problem.num_tokens, ctas, nullptr));
    CHECK(cudaDeviceSynchronize());
    const auto y = call.result();
    if (launch == 0) first = y;
    same = same && std::memcmp(first.data(), y.data(), y.size() * 4) == 0;
    whole = whole && bands_are_whole();
    counted = counted && call.load_is_right();
  }
  const double diff = difference(first, call.reference());
  const bool good = diff < 1e-4 && same && whole && counted;
  std::printf("%-4s H %d I %d E %d k %d T %d %s: diff %.2e, %s%s%s\n", good ? "ok" : "BAD", p.hidden_size,
              p.intermediate_size, p.num_local_experts, p.top_k, p.num_tokens, routing.c_str(), diff,
              same ? "bitwise stable" : "CHANGES BETWEEN LAUNCHES", whole ? "" : ", WRITES BEYOND ITS BUFFERS",
              counted ? "" : ", WRONG LOAD");
  device_free(workspace);
  w.release();
  return good ? 0 : 1;
}

// Launches that write beyond a result, since that is smaller than it should be or begins later: each has to be
// reported, and nothing else.
int overrun(const Problem& p) {
  const Weights w(p.hidden_size, p.intermediate_size, p.num_local_experts, p.format);
  const size_t row = p.hidden_size * sizeof(uint16_t);
  const char* const wanted[] = {"y is written behind its end", "y is written before its begin",
                                "load is written behind its end"};
  int missed = 0;
  for (int fault = 0; fault < 3; ++fault) {
    probe::Guards bands;  // its buffers go with the process
    probe::guards = &bands;
    Call call(p, w, "uniform", 11);
    call.share(device_array<uint8_t>(megamoe::Workspace::bytes(p), "the workspace"), make_control(p));
    if (fault == 0) call.args.y = device_array<uint8_t>(p.num_tokens * row - row, "y");
    if (fault == 1) call.args.y = static_cast<uint8_t*>(call.args.y) - row;
    if (fault == 2) call.args.load = device_array<int>(p.num_local_experts - 1, "load");
    CHECK(megamoe::launch_moe(call.args, p.num_tokens, num_sms(), nullptr));
    CHECK(cudaDeviceSynchronize());
    const std::string damage = bands.damage();
    const bool is_seen = damage.rfind(wanted[fault], 0) == 0 && damage.find('\n') + 1 == damage.size();
    std::printf("%-4s wanted that %s; found: %s\n", is_seen ? "ok" : "BAD", wanted[fault],
                damage.empty() ? "nothing" : damage.c_str());
    missed += !is_seen;
    probe::guards = nullptr;
  }
  return missed == 0 ? 0 : 1;
}

// Per call in a graph of calls with different inputs. Several layers take turns, as in a model: what one call leaves in
// the L2 of its weights is of no use to the next. `apart`: each call has scratch of its own. `touched`: experts that a
// call reads, on average.
double call_microseconds(const Problem& p, const std::vector<Weights>& layers, bool apart, double* touched) {
  std::vector<void*> scratch(apart ? kInputs : 1);
  for (void*& one : scratch) one = device_array<uint8_t>(megamoe::Workspace::bytes(p));
  megamoe::Control* control = make_control(p);
  std::vector<Call> calls;
  *touched = 0;
  for (int n = 0; n < kInputs; ++n) {
    calls.emplace_back(p, layers[n % layers.size()], "uniform", 100 + n);
    calls.back().share(scratch[n % scratch.size()], control);
    *touched += calls.back().touched() / static_cast<double>(kInputs);
  }
  const double us = graph_microseconds([&](int n, cudaStream_t stream) {
    CHECK(megamoe::launch_moe(calls[n].args, calls[n].args.problem.num_tokens, num_sms(), stream));
  });
  for (auto& c : calls) {
    for (void* q : {(void*)c.args.x, (void*)c.args.topk_ids, (void*)c.args.topk_weights, c.args.y}) cudaFree(q);
  }
  for (void* one : scratch) cudaFree(one);
  cudaFree(control);
  return us;
}

void time_shape(int h, int i, int e, int k, const std::vector<int>& token_counts, int num_layers, bool apart) {
  std::vector<Weights> layers;
  for (int n = 0; n < num_layers; ++n) layers.emplace_back(h, i, e, weight_format());
  const Weights& w = layers[0];
  for (int tokens : token_counts) {
    double touched;
    Problem p{tokens, k, h, i, e};
    p.format = w.format;
    const double us = call_microseconds(p, layers, apart, &touched);
    const size_t bytes = static_cast<size_t>(touched * w.expert_bytes) / 4096 * 4096;
    const size_t total = e * megamoe::weight_leaves(w.format, h, i)[0].expert_bytes() / 4096 * 4096;
    uint32_t* sink = device_array<uint32_t>(1);
    // Reads the gate/up weights cyclically from a moving start: as many bytes, as far apart as the calls' own.
    const double ceiling = graph_microseconds([&](int n, cudaStream_t stream) {
      CHECK(megamoe::launch_read_ceiling(w.gate_up, total, static_cast<size_t>(n) * (total / kInputs), bytes, sink,
                                         num_sms(), stream));
    });
    std::printf(
        "H %d I %d E %d k %d T %4d: touched %.1f, %7.1f us, ceiling %7.1f us (%4.0f GB/s), ratio %.3f, %.0f TFLOP/s\n",
        h, i, e, k, tokens, touched, us, ceiling, bytes / ceiling / 1000, us / ceiling,
        6.0 * h * i * k * tokens / us / 1e6);
    std::fflush(stdout);
    cudaFree(sink);
  }
  for (const Weights& layer : layers) layer.release();
}

// Each of the two orientations, twice in turn: the rule between them is made of these numbers (layout/thresholds.h).
void time_orientations(int h, int i, int e, int k, const std::vector<int>& token_counts) {
  const Weights w(h, i, e, weight_format());
  for (int tokens : token_counts) {
    double us[4], touched;
    for (int n = 0; n < 4; ++n) {
      Problem p{tokens, k, h, i, e};
      p.format = w.format;
      p.order = n % 2 == 0 ? megamoe::OperandOrder::kSwapped : megamoe::OperandOrder::kNormal;
      us[n] = call_microseconds(p, {w}, false, &touched);
    }
    std::printf("H %d I %d E %d k %d T %4d, %5.1f pairs per expert: swapAB %.1f, %.1f us, normal %.1f, %.1f us%s\n", h,
                i, e, k, tokens, static_cast<double>(tokens) * k / e, us[0], us[2], us[1], us[3],
                Problem{tokens, k, h, i, e}.swap_operands() ? ", swapAB by rule" : ", normal by rule");
    std::fflush(stdout);
  }
  w.release();
}

#ifdef MEGAMOE_TRACE
// One traced launch in the middle of a row of launches; appends "H I E k T" and the raw events to `file`.
void trace_shape(int h, int i, int e, int k, int tokens, const char* file) {
  const Weights w(h, i, e, weight_format());
  Problem p{tokens, k, h, i, e};
  p.format = w.format;
  void* workspace = device_array<uint8_t>(megamoe::Workspace::bytes(p));
  megamoe::Control* control = make_control(p);
  const size_t ctas = 2 * num_sms();  // at most
  const size_t words = ctas * megamoe::Tracer::kRoles * megamoe::Tracer::kCapacity;
  std::vector<Call> calls;
  for (int n = 0; n < kInputs; ++n) {
    calls.emplace_back(p, w, "uniform", 100 + n);
    calls.back().share(workspace, control);
  }
  uint64_t* trace = device_array<uint64_t>(words);
  CHECK(cudaMemset(trace, 0, words * 8));
  for (int round = 0; round < 3; ++round) {
    calls[8].args.trace = round == 2 ? trace : nullptr;
    for (auto& call : calls) CHECK(megamoe::launch_moe(call.args, call.args.problem.num_tokens, num_sms(), nullptr));
  }
  CHECK(cudaDeviceSynchronize());
  std::vector<uint64_t> host(words);
  CHECK(cudaMemcpy(host.data(), trace, words * 8, cudaMemcpyDeviceToHost));
  std::FILE* out = std::fopen(file, "ab");
  const uint64_t head[8] = {static_cast<uint64_t>(h), static_cast<uint64_t>(i),      static_cast<uint64_t>(e),
                            static_cast<uint64_t>(k), static_cast<uint64_t>(tokens), ctas,
                            megamoe::Tracer::kRoles,  megamoe::Tracer::kCapacity};
  std::fwrite(head, 8, 8, out);
  std::fwrite(host.data(), 8, words, out);
  std::fclose(out);
  cudaFree(trace), cudaFree(workspace), cudaFree(control);
  w.release();
}
#endif

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) {
    std::fprintf(stderr,
                 "usage: probe check H I E k T [routing] | probe overrun H I E k T | "
                 "probe (time | turns | apart | crossover) H I E k T...\n");
    return 2;
  }
  CHECK(megamoe::prepare_moe(weight_format()));
  auto number = [&](int i) { return std::atoi(argv[i]); };
  if (std::string(argv[1]) == "check" || std::string(argv[1]) == "overrun") {
    Problem p{number(6), number(5), number(2), number(3), number(4)};
    p.format = weight_format();
    if (std::string(argv[1]) == "overrun") return overrun(p);
    probe::Guards bands;
    if (!probe::is_bare()) probe::guards = &bands;
    return check(p, argc > 7 ? argv[7] : "uniform", argc > 8 ? number(8) : num_sms());
  }
#ifdef MEGAMOE_TRACE
  if (std::string(argv[1]) == "trace") {
    for (int i = 7; i < argc; ++i) trace_shape(number(3), number(4), number(5), number(6), number(i), argv[2]);
    return 0;
  }
#endif
  std::vector<int> tokens;
  for (int i = 6; i < argc; ++i) tokens.push_back(number(i));
  const std::string what = argv[1];
  if (what == "crossover") {
    time_orientations(number(2), number(3), number(4), number(5), tokens);
  } else {
    time_shape(number(2), number(3), number(4), number(5), tokens, what == "time" ? 1 : 2, what == "apart");
  }
  return 0;
}
