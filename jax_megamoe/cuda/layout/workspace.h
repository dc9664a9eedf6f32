// Scratch memory and counters of a call: the only place that computes offsets into either.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/problem.h"

namespace megamoe {

// Which route a row of an image came from, and its routing weight times the routed scaling factor. A route is a (token,
// slot) pair: number token * k + slot, so that topk_ids[route] is its expert.
struct RowSource {
  int route;  // with its rank above (kRouteRankShift) where there is a group
  float weight;
};

// Scratch of one call: images (layout/image.h) of tokens and of activations, chunk after chunk. Tokens that are
// gathered by row have the scales of their images, and lie as [T, H], those of all ranks, in the place of these.
struct Workspace {
  // What other ranks read or write: in the group's buffer, or with the rest.
  uint8_t* token_rows;     // [T, H] e4m3, where images are assembled
  float* row_scales;       // [T, H/128], likewise
  RowSource* row_sources;  // [max_rows]
  uint16_t* slot_outputs;  // [T, k, H] bf16: the expert's result of every used (token, slot)
  // Images of tokens: other ranks write them, unless they are assembled, in a ring of 128 rows for each chunk.
  uint8_t* token_planes;  // [max_rows * H] e4m3
  float* token_scales;    // [max_rows * H/128]
  // The rest, in one buffer that XLA owns.
  // Images of activations: those of all chunks, or where images of tokens are assembled, a ring like theirs.
  uint8_t* activation_planes;  // [max_rows * I] e4m3
  float* activation_scales;    // [max_rows * I / activation_scale_columns]

  static constexpr size_t kAlignment = 1024;

  static size_t shared_bytes(const Problem& p) {
    Workspace unused;
    return unused.carve_shared(p, nullptr);
  }
  static size_t local_bytes(const Problem& p) {
    Workspace unused;
    return unused.carve_local(p, nullptr);
  }
  // Where one buffer has it all.
  static size_t bytes(const Problem& p) { return shared_bytes(p) + local_bytes(p); }
  void carve(const Problem& p, void* base) { carve_local(p, static_cast<char*>(base) + carve_shared(p, base)); }

  // Both return the number of bytes; a null base only measures.
  size_t carve_shared(const Problem& p, void* base) {
    Carver carver(base);
    if (p.assembles_images()) {
      token_rows = carver.take<uint8_t>(static_cast<size_t>(p.num_tokens) * p.hidden_size);
      row_scales = carver.take<float>(static_cast<size_t>(p.num_tokens) * (p.hidden_size / kBlockK));
    } else {
      carve_images(p, carver);
    }
    row_sources = carver.take<RowSource>(p.max_rows());
    slot_outputs = carver.take<uint16_t>(static_cast<size_t>(p.num_routes()) * p.hidden_size);
    return carver.bytes();
  }
  size_t carve_local(const Problem& p, void* base) {
    const size_t rows = p.activation_rows();
    Carver carver(base);
    if (p.assembles_images()) carve_images(p, carver);
    activation_planes = carver.take<uint8_t>(rows * p.intermediate_size);
    activation_scales = carver.take<float>(rows * (p.intermediate_size / activation_scale_columns(p.swap_operands())));
    return carver.bytes();
  }

 private:
  class Carver;

  void carve_images(const Problem& p, Carver& carver) {
    const size_t rows = p.image_rows();
    token_planes = carver.take<uint8_t>(rows * p.hidden_size);
    token_scales = carver.take<float>(rows * (p.hidden_size / kBlockK));
  }

  class Carver {
   public:
    explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

    template <typename T>
    T* take(size_t count) {
      T* pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base_) + offset_);
      offset_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
      return pointer;
    }
    size_t bytes() const { return offset_; }

   private:
    char* base_;
    size_t offset_ = 0;
  };
};

// Counters that outlive a launch. Two sets take turns: a launch counts in one and clears the other for its successor,
// so nothing has to be cleaned up before or after a launch. `launch` says whose turn it is; it advances once every CTA
// has read it.
struct alignas(16) ControlHead {
  uint32_t readers;
  uint32_t launch;
  uint32_t finished;  // virtual ranks only: CTAs of all launches that are through
  uint32_t reserved;
};
struct Control : ControlHead {
  uint32_t unused[28];
  // By place: launches in which somebody has claimed the CTA's share of the tokens, and its first unit
  // (kernels/places.cuh).
  uint32_t share_claims[kMaxCtas];
  uint32_t unit_claims[kMaxCtas];
  // followed by two CounterSets of `CounterSet::words(problem)` words each

  static size_t bytes(const Problem& p);
};

class CounterSet {
 public:
  CounterSet() = default;
  // `set_words`: of each of the two sets, at least `words` of every problem that uses them.
  CounterSet(const Problem& p, Control* control, int index, int set_words)
      : base_(reinterpret_cast<uint32_t*>(control + 1) + static_cast<size_t>(index) * set_words),
        units_offset_(3 * kLineWords + p.hidden_size / kDownUnitColumns),
        assembled_offset_(units_offset_ + p.max_chunks()) {}

  static int words(const Problem& p) {
    return round_up(3 * kLineWords + p.hidden_size / kDownUnitColumns + 2 * p.max_chunks(), kLineWords);
  }

  // Tickets of the units after the first of each CTA. The first of `words` counters that follow each other.
  __host__ __device__ uint32_t* next_unit() const { return base_; }
  // Shares of the tokens that are in the token images; there is one for each CTA.
  __host__ __device__ uint32_t* dispatched_shares() const { return base_ + kLineWords; }
  // CTAs that found nothing to multiply, where no expert of the rank has tokens.
  __host__ __device__ uint32_t* idle_ctas() const { return base_ + kLineWords + 1; }
  // Tickets of the pieces of which images are assembled.
  __host__ __device__ uint32_t* next_piece() const { return base_ + 2 * kLineWords; }
  // [H/128] signals of finished down units of these columns.
  __host__ __device__ uint32_t* down_done(int unit) const { return base_ + 3 * kLineWords + unit; }
  // [max_chunks] signals of finished units of each chunk: of its gate/up units, and then, where activations go through
  // a ring, of its down units.
  __host__ __device__ uint32_t* units_done(int chunk) const { return base_ + units_offset_ + chunk; }
  // [max_chunks] pieces of each chunk's image that are in place, where images are assembled.
  __host__ __device__ uint32_t* assembled(int chunk) const { return base_ + assembled_offset_ + chunk; }

 private:
  static constexpr int kLineWords = 32;  // hot counters get a 128-byte line of their own

  uint32_t* base_ = nullptr;
  int units_offset_ = 0, assembled_offset_ = 0;
};

inline size_t Control::bytes(const Problem& p) {
  return sizeof(Control) + 2 * sizeof(uint32_t) * static_cast<size_t>(CounterSet::words(p));
}

}  // namespace megamoe
