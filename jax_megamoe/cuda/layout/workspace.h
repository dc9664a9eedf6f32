// The problem, its scratch memory and its counters: the only place that computes offsets into either.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/tiles.h"

namespace megamoe {

// Sizes of one call on one device; `num_experts` are the experts this device holds.
struct Problem {
  int num_tokens;
  int top_k;
  int hidden_size;
  int intermediate_size;
  int num_experts;

  __host__ __device__ bool swap_operands() const { return num_tokens <= kMaxSwapTokens; }
  __host__ __device__ int token_tile() const { return swap_operands() ? kSwapTokenTile : kNormalTokenTile; }
  __host__ __device__ int num_pairs() const { return num_tokens * top_k; }
  // A chunk is up to `token_tile` tokens of one expert. Whatever the routing, there are no more chunks and rows than this.
  __host__ __device__ int max_chunks() const {
    return (num_experts < num_pairs() ? num_experts : num_pairs()) + num_pairs() / token_tile();
  }
  // Chunks are padded to eight rows, the granularity of a swizzled image and of WGMMA's N.
  __host__ __device__ int max_rows() const { return num_pairs() + 7 * max_chunks(); }
};

// Which (token, slot) pair a gathered row came from, and its routing weight times the routed scaling factor.
struct RowSource {
  int pair;
  float weight;
};

// Scratch of one call, carved from one buffer that XLA owns. Token images are stored chunk after chunk; a chunk of n padded
// rows that starts at row r holds planes [K/128][n][128 bytes] at r*K and scales [K/group][n] at r*K/group.
struct Workspace {
  uint8_t* token_planes;       // [max_rows * H] e4m3
  float* token_scales;         // [max_rows * H/128]
  uint8_t* activation_planes;  // [max_rows * I] e4m3
  float* activation_scales;    // [max_rows * I/64]
  uint16_t* slot_outputs;      // [T, k, H] bf16: the expert's result of every used (token, slot)
  RowSource* row_sources;      // [max_rows]

  static constexpr size_t kAlignment = 1024;

  // With a null base this only measures: the return value is the number of bytes.
  __host__ __device__ static size_t carve(const Problem& p, void* base, Workspace* out) {
    size_t offset = 0;
    const size_t rows = p.max_rows();
    auto take = [&](size_t bytes) {
      void* pointer = static_cast<char*>(base) + offset;
      offset += (bytes + kAlignment - 1) / kAlignment * kAlignment;
      return pointer;
    };
    Workspace w;
    w.token_planes = static_cast<uint8_t*>(take(rows * p.hidden_size));
    w.token_scales = static_cast<float*>(take(rows * (p.hidden_size / kBlockK) * sizeof(float)));
    w.activation_planes = static_cast<uint8_t*>(take(rows * p.intermediate_size));
    w.activation_scales =
        static_cast<float*>(take(rows * (p.intermediate_size / kActivationScaleColumns) * sizeof(float)));
    w.slot_outputs = static_cast<uint16_t*>(take(static_cast<size_t>(p.num_pairs()) * p.hidden_size * 2));
    w.row_sources = static_cast<RowSource*>(take(rows * sizeof(RowSource)));
    if (out != nullptr) *out = w;
    return offset;
  }

  static size_t bytes(const Problem& p) { return carve(p, nullptr, nullptr); }
};

// Counters that outlive a launch. Two sets take turns: a launch counts in one and clears the other for its successor, so
// nothing has to be cleaned up before or after a launch. `launch` says whose turn it is; it advances once every CTA has read it.
struct Control {
  uint32_t readers;
  uint32_t launch;
  uint32_t reserved[30];
  // followed by two CounterSets of `CounterSet::words(problem)` words each

  __host__ __device__ static size_t bytes(const Problem& p);
};

class CounterSet {
 public:
  CounterSet() = default;
  __host__ __device__ CounterSet(const Problem& p, Control* control, uint32_t index)
      : base_(reinterpret_cast<uint32_t*>(control + 1) + static_cast<size_t>(index) * words(p)),
        gate_up_offset_(2 * kLineWords + p.hidden_size / kDownUnitColumns) {}

  __host__ __device__ static int words(const Problem& p) {
    return round_up(2 * kLineWords + p.hidden_size / kDownUnitColumns + p.max_chunks(), kLineWords);
  }

  // Tickets of the units after the first of each CTA. The first of `words` counters that follow each other.
  __host__ __device__ uint32_t* next_unit() const { return base_; }
  // CTAs whose share of the tokens is in the token images.
  __host__ __device__ uint32_t* quantized_ctas() const { return base_ + kLineWords; }
  // [H/128] signals of finished down units of these columns.
  __host__ __device__ uint32_t* down_done(int unit) const { return base_ + 2 * kLineWords + unit; }
  // [max_chunks] gate/up units finished for each chunk.
  __host__ __device__ uint32_t* gate_up_done(int chunk) const { return base_ + gate_up_offset_ + chunk; }

 private:
  static constexpr int kLineWords = 32;  // hot counters get a 128-byte line of their own

  uint32_t* base_ = nullptr;
  int gate_up_offset_ = 0;
};

__host__ __device__ inline size_t Control::bytes(const Problem& p) {
  return sizeof(Control) + 2 * sizeof(uint32_t) * static_cast<size_t>(CounterSet::words(p));
}

}  // namespace megamoe
