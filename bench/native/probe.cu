// Development probe of the fused kernel without JAX: checks it against naive kernels and times it in a CUDA graph beside the
// device's read ceiling. Starts in a second, which makes it the program to run under compute-sanitizer.
//   probe check H I E k T [routing]     routing: uniform, one (all on one expert), masked, none
//   probe time H I E k T...             per call in a graph of 12 calls with 12 inputs
//   probe trace FILE H I E k T...       events of one launch, in a build with MEGAMOE_TRACE (scripts/probe trace)
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "bench/read_ceiling.h"
#include "host/launch.h"
#include "kernels/trace.cuh"
#include "reference.cuh"
#include "timing.h"

namespace {

using megamoe::MoeArguments;
using megamoe::Problem;

using probe::graph_microseconds;
using probe::kInputs;

template <typename T>
T* device_array(size_t count) {
  void* pointer;
  CHECK(cudaMalloc(&pointer, std::max<size_t>(count, 1) * sizeof(T)));
  return static_cast<T*>(pointer);
}

__global__ void fill_e4m3(uint8_t* out, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint32_t v = static_cast<uint32_t>(i) * 2654435761u + seed + static_cast<uint32_t>(i >> 32) * 97u;
    v ^= v >> 16, v *= 0x85ebca6bu, v ^= v >> 13, v *= 0xc2b2ae35u, v ^= v >> 16;
    const uint32_t magnitude = 0x28 + v % 0x38;  // 2^-2 .. 2^5
    out[i] = magnitude | (v >> 24 & 0x80);
  }
}

__global__ void fill_uniform(float* out, size_t count, float low, float high, uint32_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint32_t v = static_cast<uint32_t>(i) * 2246822519u + seed;
    v ^= v >> 15, v *= 0x2c1b3c6du, v ^= v >> 12, v *= 0x297a2d39u, v ^= v >> 15;
    out[i] = low + (high - low) * (v >> 8) / 16777216.0f;
  }
}

// Tiles 2j and 2j + 1 lie in one 128-row block of scales.
__global__ void share_scales_by_tile_pairs(float* scales, size_t pairs, int floats_per_tile) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < pairs * floats_per_tile;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    float* first = scales + i / floats_per_tile * 2 * floats_per_tile + i % floats_per_tile;
    first[floats_per_tile] = *first;
  }
}

struct Weights {
  uint8_t *gate_up, *down;
  float *gate_up_scale, *down_scale;

  Weights(int h, int i, int e) {
    const size_t gate_up_count = static_cast<size_t>(e) * 2 * i * h, down_count = gate_up_count / 2;
    const size_t scales = static_cast<size_t>(e) * (i / 64) * (h / 128) * 4;
    const size_t down_scales = static_cast<size_t>(e) * (h / 64) * ((i / 128 + 1) / 2) * 4;
    gate_up = device_array<uint8_t>(gate_up_count);
    down = device_array<uint8_t>(down_count);
    gate_up_scale = device_array<float>(scales);
    down_scale = device_array<float>(down_scales);
    fill_e4m3<<<1024, 256>>>(gate_up, gate_up_count, 1);
    fill_e4m3<<<1024, 256>>>(down, down_count, 2);
    const float size = 0.1f / std::sqrt(static_cast<float>(h));
    fill_uniform<<<256, 256>>>(gate_up_scale, scales, 0.5f * size, size, 3);
    fill_uniform<<<256, 256>>>(down_scale, down_scales, 0.5f * size, size, 4);
    share_scales_by_tile_pairs<<<256, 256>>>(gate_up_scale, static_cast<size_t>(e) * (i / 128), h / 128 * 4);
    share_scales_by_tile_pairs<<<256, 256>>>(down_scale, static_cast<size_t>(e) * (h / 128), (i / 128 + 1) / 2 * 4);
    CHECK(cudaDeviceSynchronize());
  }
};

// One set of inputs and outputs, on the device, with the host's copy of the ids.
struct Call {
  std::vector<int> ids;
  MoeArguments args{};
  size_t y_count;

  Call(const Problem& p, const Weights& w, const std::string& routing, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    ids.resize(p.num_pairs());
    std::vector<float> weights(ids.size());
    std::vector<int> experts(p.num_experts);
    for (int e = 0; e < p.num_experts; ++e) experts[e] = e;
    for (int t = 0; t < p.num_tokens; ++t) {
      std::shuffle(experts.begin(), experts.end(), random);
      for (int s = 0; s < p.top_k; ++s) {
        int& id = ids[t * p.top_k + s];
        id = experts[s % p.num_experts];
        if (routing == "one") id = p.num_experts / 2;
        if (routing == "none" || (routing == "masked" && random() % 10 < 3)) id = random() % 2 ? -1 : p.num_experts + 7;
        weights[t * p.top_k + s] = id >= 0 && id < p.num_experts ? 0.05f + random() % 1000 / 1000.0f : NAN;
      }
    }
    std::vector<uint16_t> x(static_cast<size_t>(p.num_tokens) * p.hidden_size);
    for (auto& v : x) {
      const float f = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      v = bits >> 16;
    }
    y_count = x.size();
    args.problem = p;
    args.num_layers = 1;
    auto upload = [](const auto& host) {
      using T = typename std::decay_t<decltype(host)>::value_type;
      T* device = device_array<T>(host.size());
      CHECK(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
      return device;
    };
    args.x = upload(x);
    args.topk_ids = upload(ids);
    args.topk_weights = upload(weights);
    args.layer = upload(std::vector<int>{0});
    args.gate_up = w.gate_up, args.gate_up_scale = w.gate_up_scale;
    args.down = w.down, args.down_scale = w.down_scale;
    args.activation_clamp = 10.0f;
    args.routed_scaling_factor = 1.5f;
    args.y = device_array<uint16_t>(y_count);
    args.load = device_array<int>(p.num_experts);
    args.y_is_f32 = false;
  }

  void share(void* workspace, megamoe::Control* control) {
    megamoe::Workspace::carve(args.problem, workspace, &args.workspace);
    args.control = control;
  }

  int touched() const {
    std::vector<int> sorted;
    for (int id : ids) {
      if (id >= 0 && id < args.problem.num_experts) sorted.push_back(id);
    }
    std::sort(sorted.begin(), sorted.end());
    return std::unique(sorted.begin(), sorted.end()) - sorted.begin();
  }

  std::vector<float> result() const {
    std::vector<uint16_t> raw(y_count);
    CHECK(cudaMemcpy(raw.data(), args.y, y_count * 2, cudaMemcpyDeviceToHost));
    std::vector<float> out(y_count);
    for (size_t i = 0; i < y_count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(raw[i]) << 16;
      std::memcpy(&out[i], &bits, 4);
    }
    return out;
  }

  std::vector<float> reference() const {
    const Problem& p = args.problem;
    const probe::Sizes s{p.num_tokens, p.top_k, p.hidden_size, p.intermediate_size, p.num_experts};
    const size_t pairs = p.num_pairs();
    float* values = device_array<float>(y_count);
    float* scales = device_array<float>(y_count / 128);
    float* h = device_array<float>(pairs * s.inter);
    float* h_scales = device_array<float>(pairs * s.inter / 64);
    float* out = device_array<float>(pairs * s.hidden);
    float* y = device_array<float>(y_count);
    const int blocks = s.tokens * (s.hidden / 128);
    probe::quantize<<<(blocks + 127) / 128, 128>>>(s, reinterpret_cast<const __nv_bfloat16*>(args.x), values, scales);
    probe::gate_up<<<dim3(pairs, (s.inter + 127) / 128), 128>>>(s, values, scales, args.gate_up, args.gate_up_scale,
                                                                args.topk_ids, args.topk_weights, args.activation_clamp,
                                                                args.routed_scaling_factor, h);
    const int groups = pairs * (s.inter / 64);
    probe::requantize<<<(groups + 127) / 128, 128>>>(s, h, h_scales);
    probe::down<<<dim3(pairs, (s.hidden + 127) / 128), 128>>>(s, h, h_scales, args.down, args.down_scale, args.topk_ids,
                                                              out);
    probe::combine<<<dim3(s.tokens, (s.hidden + 127) / 128), 128>>>(s, out, args.topk_ids, y);
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    std::vector<float> host(y_count);
    CHECK(cudaMemcpy(host.data(), y, y_count * 4, cudaMemcpyDeviceToHost));
    for (void* pointer : {(void*)values, (void*)scales, (void*)h, (void*)h_scales, (void*)out, (void*)y}) {
      CHECK(cudaFree(pointer));
    }
    return host;
  }
};

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) ab += (double)a[i] * b[i], aa += (double)a[i] * a[i], bb += (double)b[i] * b[i];
  return aa + bb == 0 ? 0 : 1 - 2 * ab / (aa + bb);
}

megamoe::Control* make_control(const Problem& p) {
  void* control;
  CHECK(cudaMalloc(&control, megamoe::Control::bytes(p)));
  CHECK(cudaMemset(control, 0, megamoe::Control::bytes(p)));
  return static_cast<megamoe::Control*>(control);
}

int num_sms() {
  int sms;
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  return sms;
}

int check(const Problem& p, const std::string& routing) {
  const Weights w(p.hidden_size, p.intermediate_size, p.num_experts);
  Call call(p, w, routing, 11);
  const size_t bytes = megamoe::Workspace::bytes(p);
  void* workspace = device_array<uint8_t>(bytes);
  call.share(workspace, make_control(p));
  std::vector<float> first;
  bool same = true;
  for (int launch = 0; launch < 3; ++launch) {
    CHECK(cudaMemset(workspace, 0xff, bytes));  // NaN everywhere that is not written
    CHECK(cudaMemset(call.args.y, 0xff, call.y_count * 2));
    CHECK(megamoe::launch_moe(call.args, num_sms(), nullptr));
    CHECK(cudaDeviceSynchronize());
    const auto y = call.result();
    if (launch == 0) first = y;
    same = same && std::memcmp(first.data(), y.data(), y.size() * 4) == 0;
  }
  const double diff = difference(first, call.reference());
  const bool good = diff < 1e-4 && same;
  std::printf("%-4s H %d I %d E %d k %d T %d %s: diff %.2e, %s\n", good ? "ok" : "BAD", p.hidden_size,
              p.intermediate_size, p.num_experts, p.top_k, p.num_tokens, routing.c_str(), diff,
              same ? "bitwise stable" : "CHANGES BETWEEN LAUNCHES");
  CHECK(cudaFree(workspace));
  for (void* pointer : {(void*)w.gate_up, (void*)w.down, (void*)w.gate_up_scale, (void*)w.down_scale})
    cudaFree(pointer);
  return good ? 0 : 1;
}

void time_shape(int h, int i, int e, int k, const std::vector<int>& token_counts) {
  const Weights w(h, i, e);
  for (int tokens : token_counts) {
    const Problem p{tokens, k, h, i, e};
    void* workspace = device_array<uint8_t>(megamoe::Workspace::bytes(p));
    megamoe::Control* control = make_control(p);
    std::vector<Call> calls;
    double touched = 0;
    for (int n = 0; n < kInputs; ++n) {
      calls.emplace_back(p, w, "uniform", 100 + n);
      calls.back().share(workspace, control);
      touched += calls.back().touched() / static_cast<double>(kInputs);
    }
    const double us = graph_microseconds(
        [&](int n, cudaStream_t stream) { CHECK(megamoe::launch_moe(calls[n].args, num_sms(), stream)); });
    const double expert_bytes = 3.0 * h * i;
    const size_t bytes = static_cast<size_t>(touched * expert_bytes) / 4096 * 4096;
    const size_t total = static_cast<size_t>(e) * 2 * h * i;
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
    for (auto& c : calls) {
      for (void* q : {(void*)c.args.x, (void*)c.args.topk_ids, (void*)c.args.topk_weights, c.args.y}) cudaFree(q);
    }
    cudaFree(workspace), cudaFree(control), cudaFree(sink);
  }
  for (void* pointer : {(void*)w.gate_up, (void*)w.down, (void*)w.gate_up_scale, (void*)w.down_scale})
    cudaFree(pointer);
}

#ifdef MEGAMOE_TRACE
// One traced launch in the middle of a row of launches; appends "H I E k T" and the raw events to `file`.
void trace_shape(int h, int i, int e, int k, int tokens, const char* file) {
  const Weights w(h, i, e);
  const Problem p{tokens, k, h, i, e};
  void* workspace = device_array<uint8_t>(megamoe::Workspace::bytes(p));
  megamoe::Control* control = make_control(p);
  const size_t words = static_cast<size_t>(num_sms()) * megamoe::Tracer::kRoles * megamoe::Tracer::kCapacity;
  std::vector<Call> calls;
  for (int n = 0; n < kInputs; ++n) {
    calls.emplace_back(p, w, "uniform", 100 + n);
    calls.back().share(workspace, control);
  }
  uint64_t* trace = device_array<uint64_t>(words);
  CHECK(cudaMemset(trace, 0, words * 8));
  for (int round = 0; round < 3; ++round) {
    calls[8].args.trace = round == 2 ? trace : nullptr;
    for (auto& call : calls) CHECK(megamoe::launch_moe(call.args, num_sms(), nullptr));
  }
  CHECK(cudaDeviceSynchronize());
  std::vector<uint64_t> host(words);
  CHECK(cudaMemcpy(host.data(), trace, words * 8, cudaMemcpyDeviceToHost));
  std::FILE* out = std::fopen(file, "ab");
  const uint64_t head[8] = {static_cast<uint64_t>(h), static_cast<uint64_t>(i),      static_cast<uint64_t>(e),
                            static_cast<uint64_t>(k), static_cast<uint64_t>(tokens), static_cast<uint64_t>(num_sms()),
                            megamoe::Tracer::kRoles,  megamoe::Tracer::kCapacity};
  std::fwrite(head, 8, 8, out);
  std::fwrite(host.data(), 8, words, out);
  std::fclose(out);
  cudaFree(trace), cudaFree(workspace), cudaFree(control);
  for (void* pointer : {(void*)w.gate_up, (void*)w.down, (void*)w.gate_up_scale, (void*)w.down_scale})
    cudaFree(pointer);
}
#endif

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) {
    std::fprintf(stderr, "usage: probe check H I E k T [routing] | probe time H I E k T...\n");
    return 2;
  }
  CHECK(megamoe::prepare_kernels());
  auto number = [&](int i) { return std::atoi(argv[i]); };
  if (std::string(argv[1]) == "check") {
    return check({number(6), number(5), number(2), number(3), number(4)}, argc > 7 ? argv[7] : "uniform");
  }
#ifdef MEGAMOE_TRACE
  if (std::string(argv[1]) == "trace") {
    for (int i = 7; i < argc; ++i) trace_shape(number(3), number(4), number(5), number(6), number(i), argv[2]);
    return 0;
  }
#endif
  std::vector<int> tokens;
  for (int i = 6; i < argc; ++i) tokens.push_back(number(i));
  time_shape(number(2), number(3), number(4), number(5), tokens);
  return 0;
}
