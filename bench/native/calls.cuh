// Weights, inputs and references for the development programs.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "guards.h"
#include "host/launch.h"
#include "reference.cuh"
#include "timing.h"

namespace probe {

using megamoe::MoeArguments;
using megamoe::Problem;

// `name` is what a report of damaged guard bands says.
template <typename T>
inline T* device_array(size_t count, const char* name = "an array of the reference") {
  if (guards != nullptr) return static_cast<T*>(guards->allocate(name, count * sizeof(T)));
  void* pointer;
  CHECK(cudaMalloc(&pointer, std::max<size_t>(count, 1) * sizeof(T)));
  return static_cast<T*>(pointer);
}

inline void device_free(const void* pointer) {
  if (guards == nullptr || !guards->release(pointer)) CHECK(cudaFree(const_cast<void*>(pointer)));
}

static __global__ void fill_e4m3(uint8_t* out, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint32_t v = static_cast<uint32_t>(i) * 2654435761u + seed + static_cast<uint32_t>(i >> 32) * 97u;
    v ^= v >> 16, v *= 0x85ebca6bu, v ^= v >> 13, v *= 0xc2b2ae35u, v ^= v >> 16;
    const uint32_t magnitude = 0x28 + v % 0x38;  // 2^-2 .. 2^5
    out[i] = magnitude | (v >> 24 & 0x80);
  }
}

static __global__ void fill_uniform(float* out, size_t count, float low, float high, uint32_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint32_t v = static_cast<uint32_t>(i) * 2246822519u + seed;
    v ^= v >> 15, v *= 0x2c1b3c6du, v ^= v >> 12, v *= 0x297a2d39u, v ^= v >> 15;
    out[i] = low + (high - low) * (v >> 8) / 16777216.0f;
  }
}

// Standard normal numbers as bf16; on the device, since a host takes seconds for thousands of tokens.
static __global__ void fill_normal(uint16_t* out, size_t count, uint32_t seed) {
  auto mix = [](uint32_t v) {
    v ^= v >> 16, v *= 0x7feb352du, v ^= v >> 15, v *= 0x846ca68bu, v ^= v >> 16;
    return v;
  };
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    const uint32_t first = mix(static_cast<uint32_t>(i) * 2654435761u + seed), second = mix(first + 0x9e3779b9u);
    const float radius = sqrtf(-2.0f * logf((first + 1.0f) * 0x1p-32f)), angle = 6.2831853f * second * 0x1p-32f;
    out[i] = __float_as_uint(radius * cosf(angle)) >> 16;
  }
}

// Tiles 2j and 2j + 1 lie in one 128-row block of scales.
static __global__ void share_scales_by_tile_pairs(float* scales, size_t pairs, int floats_per_tile) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < pairs * floats_per_tile;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    float* first = scales + i / floats_per_tile * 2 * floats_per_tile + i % floats_per_tile;
    first[floats_per_tile] = *first;
  }
}

// Of every command: the environment's PROBE_FORMAT, fp8_block if it is not set.
inline megamoe::WeightFormat weight_format() {
  const char* name = std::getenv("PROBE_FORMAT");
  const auto* known = megamoe::find_format(name == nullptr ? "fp8_block" : name);
  if (known == nullptr) {
    std::fprintf(stderr, "PROBE_FORMAT is %s; wanted fp8_block, fp8_channel or mxfp4\n", name);
    std::exit(2);
  }
  return known->format;
}

// Any codes, exponents over seven binades.
static __global__ void fill_mxfp4(uint8_t* out, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint32_t v = static_cast<uint32_t>(i) * 2654435761u + seed + static_cast<uint32_t>(i >> 32) * 97u;
    v ^= v >> 16, v *= 0x85ebca6bu, v ^= v >> 13, v *= 0xc2b2ae35u, v ^= v >> 16;
    out[i] = i % megamoe::Mxfp4::kPlaneBytes < megamoe::Mxfp4::kCodeBytes ? v : 8 + v % 7;
  }
}

struct Weights {
  uint8_t *gate_up, *down;
  float *gate_up_scale, *down_scale;
  megamoe::WeightFormat format;
  size_t expert_bytes;  // of both matrices

  Weights(int h, int i, int e, megamoe::WeightFormat weight_format = megamoe::WeightFormat::kFp8Block)
      : format(weight_format) {
    const auto leaves = megamoe::weight_leaves(format, h, i);
    expert_bytes = leaves[0].expert_bytes() + leaves[2].expert_bytes();
    if (format != megamoe::WeightFormat::kFp8Block) {
      make_row_scaled(leaves, e);
      return;
    }
    const size_t gate_up_count = static_cast<size_t>(e) * 2 * i * h, down_count = gate_up_count / 2;
    const size_t scales = static_cast<size_t>(e) * (i / 64) * (h / 128) * 4;
    const size_t down_scales = static_cast<size_t>(e) * (h / 64) * ((i / 128 + 1) / 2) * 4;
    gate_up = device_array<uint8_t>(gate_up_count, "gate_up");
    down = device_array<uint8_t>(down_count, "down");
    gate_up_scale = device_array<float>(scales, "gate_up_scale");
    down_scale = device_array<float>(down_scales, "down_scale");
    fill_e4m3<<<1024, 256>>>(gate_up, gate_up_count, 1);
    fill_e4m3<<<1024, 256>>>(down, down_count, 2);
    const float size = 0.1f / std::sqrt(static_cast<float>(h));
    fill_uniform<<<256, 256>>>(gate_up_scale, scales, 0.5f * size, size, 3);
    fill_uniform<<<256, 256>>>(down_scale, down_scales, 0.5f * size, size, 4);
    share_scales_by_tile_pairs<<<256, 256>>>(gate_up_scale, static_cast<size_t>(e) * (i / 128), h / 128 * 4);
    share_scales_by_tile_pairs<<<256, 256>>>(down_scale, static_cast<size_t>(e) * (h / 128), (i / 128 + 1) / 2 * 4);
    CHECK(cudaDeviceSynchronize());
  }

  void make_row_scaled(const megamoe::WeightLeaves& leaves, int e) {
    gate_up = device_array<uint8_t>(e * leaves[0].expert_bytes(), "gate_up");
    gate_up_scale = device_array<float>(e * leaves[1].expert_bytes() / sizeof(float), "gate_up_scale");
    down = device_array<uint8_t>(e * leaves[2].expert_bytes(), "down");
    down_scale = device_array<float>(e * leaves[3].expert_bytes() / sizeof(float), "down_scale");
    const auto fill = format == megamoe::WeightFormat::kMxfp4 ? fill_mxfp4 : fill_e4m3;
    fill<<<1024, 256>>>(gate_up, e * leaves[0].expert_bytes(), 1);
    fill<<<1024, 256>>>(down, e * leaves[2].expert_bytes(), 2);
    // Weights are of the size of block FP8's.
    const float hidden = leaves[2].dims[0] * 64.0f;
    const float size = (format == megamoe::WeightFormat::kMxfp4 ? 0.4f : 0.1f) / std::sqrt(hidden);
    fill_uniform<<<256, 256>>>(gate_up_scale, e * leaves[1].expert_bytes() / sizeof(float), 0.5f * size, size, 3);
    fill_uniform<<<256, 256>>>(down_scale, e * leaves[3].expert_bytes() / sizeof(float), 0.5f * size, size, 4);
    CHECK(cudaDeviceSynchronize());
  }

  void release() const {
    for (const void* pointer : {(void*)gate_up, (void*)down, (void*)gate_up_scale, (void*)down_scale}) {
      device_free(pointer);
    }
  }
};

// PROBE_BARE in the environment: no guard bands and no poison, for compute-sanitizer. It looks for the same by itself,
// and would take a band for a part of its buffer, and poison for values that somebody has set.
inline bool is_bare() { return std::getenv("PROBE_BARE") != nullptr; }

// What the kernel may read without anybody having written it, as it copies images whole and sources in pairs: rows with
// which chunks are padded to eight. Nothing comes of them. All else of a workspace has to be written before it is read,
// which initcheck sees.
inline void set_padding(const Problem& p, const megamoe::Workspace& workspace) {
  const size_t hidden = p.hidden_size, inter = p.intermediate_size;
  const size_t images = p.image_rows(), activations = p.activation_rows();
  const size_t scales = inter / megamoe::activation_scale_columns(p.swap_operands());
  CHECK(cudaMemset(workspace.token_planes, 0xff, images * hidden));
  CHECK(cudaMemset(workspace.token_scales, 0xff, images * (hidden / megamoe::kBlockK) * sizeof(float)));
  CHECK(cudaMemset(workspace.row_sources, 0xff, p.max_rows() * sizeof(megamoe::RowSource)));
  CHECK(cudaMemset(workspace.activation_planes, 0xff, activations * inter));
  CHECK(cudaMemset(workspace.activation_scales, 0xff, activations * scales * sizeof(float)));
}

// One set of inputs and outputs, on the device, with the host's copy of the ids.
struct Call {
  std::vector<int> ids;
  MoeArguments args{};
  size_t y_count;

  Call(const Problem& p, const Weights& w, const std::string& routing, uint32_t seed) {
    std::mt19937 random(seed);
    ids.resize(p.num_routes());
    std::vector<float> weights(ids.size());
    std::vector<int> experts(p.num_local_experts);
    for (int e = 0; e < p.num_local_experts; ++e) experts[e] = e;
    for (int t = 0; t < p.num_tokens; ++t) {
      std::shuffle(experts.begin(), experts.end(), random);
      for (int s = 0; s < p.top_k; ++s) {
        int& id = ids[t * p.top_k + s];
        id = experts[s % p.num_local_experts];
        if (routing == "one") id = p.num_local_experts / 2;
        if (routing == "none" || (routing == "masked" && random() % 10 < 3))
          id = random() % 2 ? -1 : p.num_local_experts + 7;
        weights[t * p.top_k + s] = id >= 0 && id < p.num_local_experts ? 0.05f + random() % 1000 / 1000.0f : NAN;
      }
    }
    y_count = static_cast<size_t>(p.num_tokens) * p.hidden_size;
    args.problem = p;
    args.problem.format = w.format;
    args.num_layers = 1;
    auto upload = [](const auto& host, const char* name) {
      using T = typename std::decay_t<decltype(host)>::value_type;
      T* device = device_array<T>(host.size(), name);
      CHECK(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
      return device;
    };
    uint16_t* x = device_array<uint16_t>(y_count, "x");
    fill_normal<<<1024, 256>>>(x, y_count, seed * 2246822519u);
    args.x = x;
    args.topk_ids = upload(ids, "topk_ids");
    args.topk_weights = upload(weights, "topk_weights");
    args.layer = upload(std::vector<int>{0}, "layer");
    args.weights = {w.gate_up, w.gate_up_scale, w.down, w.down_scale};
    args.activation.clamp = 10.0f;
    args.routed_scaling_factor = 1.5f;
    args.y = device_array<uint16_t>(y_count, "y");
    args.load = device_array<int>(p.num_local_experts, "load");
    args.y_is_f32 = false;
  }

  void share(void* workspace, megamoe::Control* control) {
    args.workspace.carve(args.problem, workspace);
    args.control = control;
    args.counter_words = megamoe::CounterSet::words(args.problem);
  }

  // Before a launch that has the workspace for itself: NaN everywhere that is not written.
  void poison(void* workspace, size_t bytes) const {
    poison_results();
    if (is_bare()) {
      set_padding(args.problem, args.workspace);
    } else {
      CHECK(cudaMemsetAsync(workspace, 0xff, bytes, nullptr));
    }
  }

  // ... of y and load alone.
  void poison_results() const {
    if (is_bare()) return;
    CHECK(cudaMemsetAsync(args.y, 0xff, y_count * sizeof(uint16_t), nullptr));
    CHECK(cudaMemsetAsync(args.load, 0xff, args.problem.num_local_experts * sizeof(int), nullptr));
  }

  // Whether the load is the number of routes of each expert.
  bool load_is_right() const {
    std::vector<int> wanted(args.problem.num_local_experts), found(wanted.size());
    for (int id : ids) {
      if (id >= 0 && id < args.problem.num_local_experts) ++wanted[id];
    }
    CHECK(cudaMemcpy(found.data(), args.load, found.size() * sizeof(int), cudaMemcpyDeviceToHost));
    return found == wanted;
  }

  int touched() const {
    std::vector<int> sorted;
    for (int id : ids) {
      if (id >= 0 && id < args.problem.num_local_experts) sorted.push_back(id);
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
    const probe::Sizes s{p.num_tokens, p.top_k, p.hidden_size, p.intermediate_size, p.num_local_experts, p.format};
    const size_t pairs = p.num_routes();
    float* values = device_array<float>(y_count);
    float* scales = device_array<float>(y_count / 128);
    float* h = device_array<float>(pairs * s.inter);
    CHECK(cudaMemset(h, 0, pairs * s.inter * sizeof(float)));  // unused routes leave theirs as it is
    float* h_scales = device_array<float>(pairs * s.inter / 64);
    float* out = device_array<float>(pairs * s.hidden);
    float* y = device_array<float>(y_count);
    const int blocks = s.tokens * (s.hidden / 128);
    probe::quantize<<<(blocks + 127) / 128, 128>>>(s, reinterpret_cast<const __nv_bfloat16*>(args.x), values, scales);
    probe::gate_up<<<dim3(pairs, (s.inter + 127) / 128), 128>>>(
        s, values, scales, args.weights.gate_up, args.weights.gate_up_scale, args.topk_ids, args.topk_weights,
        args.activation.clamp, args.routed_scaling_factor, h);
    const int groups = pairs * (s.inter / 64);
    probe::requantize<<<(groups + 127) / 128, 128>>>(s, h, h_scales);
    probe::down<<<dim3(pairs, (s.hidden + 127) / 128), 128>>>(s, h, h_scales, args.weights.down,
                                                              args.weights.down_scale, args.topk_ids, args.topk_weights,
                                                              args.routed_scaling_factor, out);
    probe::combine<<<dim3(s.tokens, (s.hidden + 127) / 128), 128>>>(s, out, args.topk_ids, y);
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    std::vector<float> host(y_count);
    CHECK(cudaMemcpy(host.data(), y, y_count * 4, cudaMemcpyDeviceToHost));
    for (void* pointer : {(void*)values, (void*)scales, (void*)h, (void*)h_scales, (void*)out, (void*)y}) {
      device_free(pointer);
    }
    return host;
  }
};

inline double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) ab += (double)a[i] * b[i], aa += (double)a[i] * a[i], bb += (double)b[i] * b[i];
  return aa + bb == 0 ? 0 : 1 - 2 * ab / (aa + bb);
}

inline megamoe::Control* make_control(const Problem& p) {
  void* control = device_array<uint8_t>(megamoe::Control::bytes(p), "the counters");
  CHECK(cudaMemset(control, 0, megamoe::Control::bytes(p)));
  return static_cast<megamoe::Control*>(control);
}

inline int num_sms() {
  int sms;
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  return sms;
}

}  // namespace probe
