// The decoders: a warpgroup that turns MXFP4 weights into E5M2 numbers, from a stage of codes to a stage of the
// consumers' ring, as WGMMA reads its B operand from shared memory. One K block at a time, and as far ahead of the
// consumers as there are stages.
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory_order.cuh"
#include "kernels/e2m1.cuh"
#include "kernels/ring.cuh"
#include "kernels/shared_map.cuh"

namespace megamoe {

template <typename Orientation>
class WeightDecoder {
 public:
  __device__ WeightDecoder(const MoeArguments& args, const SharedMap<Orientation>& map) : args_(args), map_(map) {}

  // All of the warpgroup, block after block, until a note says that there are no more units.
  __device__ __forceinline__ void run() {
    while (true) {
      await(&header().codes.full[codes_.stage], codes_.parity);
      await(&header().empty[to_.stage], to_.parity ^ 1);
      const UnitNote note = header().codes.note[codes_.stage];
      if (thread() == 0) header().note[to_.stage] = note;
      if (note.end()) break;
      copy_row_terms();
      const int blocks = (note.down() ? args_.problem.intermediate_size : args_.problem.hidden_size) / kBlockK;
      if (header().codes.shared[codes_.stage] != 0) {
        decode_unit<true>(blocks);
      } else {
        decode_unit<false>(blocks);
      }
    }
    __syncwarp();
    if (arrives()) ptx::mbarrier_arrive(&header().weights_full[to_.stage]);
  }

 private:
  static constexpr int kPlanes = 2 * Orientation::kUnitTiles;
  static constexpr int kHalfBytes = Mxfp4::kCodeBytes / 2;

  __device__ static SharedHeader& header() { return shared_header(); }
  __device__ static int thread() { return threadIdx.x % kWarpgroupThreads; }

  __device__ static bool arrives() { return kEveryLaneArrives || thread() % 32 == 0; }

  // A unit, both of whose first stages are there. `kShared`: one of its tiles, for both CTAs.
  template <bool kShared>
  __device__ __forceinline__ void decode_unit(int blocks) {
    const int first_plane = kShared ? 2 * ptx::cluster_rank() : 0;
    Words words;
    bool loaded = false;
#pragma unroll 1
    while (true) {
      if (!loaded) {
        await(&header().codes.full[codes_.stage], codes_.parity);
        words = load(Lane(), first_plane);
      }
      await(&header().empty[to_.stage], to_.parity ^ 1);
      decode<kShared ? 2 : kPlanes>(words, first_plane);
      __syncwarp();
      if (arrives()) ptx::mbarrier_arrive(&header().codes.empty[codes_.stage]);
      codes_.advance(kCodeStages);
      // What comes next is loaded while this block's stores end, if it has landed.
      --blocks;
      loaded = blocks > 0 && ptx::mbarrier_test_wait(&header().codes.full[codes_.stage], codes_.parity);
      if (loaded) words = load(Lane(), first_plane);
      ptx::fence_proxy_async_shared();  // the multiply, and the copy engine, read what was just written
      pass_on<kShared>(first_plane);
      if (blocks == 0) return;
    }
  }

  // The consumers' stage has what this warp decodes; so has the other CTA's, if it shares the weights.
  template <bool kShared>
  __device__ __forceinline__ void pass_on(int first_plane) {
    __syncwarp();
    uint64_t* full = &header().weights_full[to_.stage];
    if constexpr (kShared) {
      constexpr int kWarpBytes = kPlaneRows / kDecoderWarps * kBlockK;  // of a plane
      if (thread() % 32 == 0) {
        const uint8_t* rows = map_.weights(to_.stage) + first_plane * kPlaneRows * kBlockK + thread() / 32 * kWarpBytes;
        const uint32_t partner = ptx::cluster_rank() ^ 1;
        ptx::mbarrier_expect_tx(full, 2 * kWarpBytes);
        ptx::bulk_copy_in_cluster(rows, kWarpBytes, full, partner);
        ptx::bulk_copy_in_cluster(rows + kPlaneRows * kBlockK, kWarpBytes, full, partner);
      }
      __syncwarp();
    }
    if (arrives()) ptx::mbarrier_arrive(full);
    to_.advance(map_.num_stages);
  }

  // Scales and biases of the unit's rows.
  __device__ __forceinline__ void copy_row_terms() const {
    static_assert(Orientation::kRowTermBytes == kWarpgroupThreads * sizeof(float4));
    const uint8_t* from = map_.landing(codes_.stage) + Orientation::kStageWeightBytes;
    reinterpret_cast<float4*>(map_.weights(to_.stage) + Orientation::kOperandBytes)[thread()] =
        reinterpret_cast<const float4*>(from)[thread()];
  }

  // Where a thread reads and writes in each plane. It has two rows, and of these 16 columns of each half, which are side
  // by side and of one group. Odd rows begin with the second half: so eight lanes' pieces of 16 bytes meet all banks.
  struct Lane {
    uint32_t source;     // of the words that are decoded first
    uint32_t exponents;  // of both rows and halves
    uint32_t order;      // of these: first half, second half
    uint32_t place;      // of the low row's first piece

    __device__ __forceinline__ Lane() {
      uint32_t thread = threadIdx.x % kWarpgroupThreads;
      asm volatile("" : "+r"(thread));  // worked out for each block: there are no registers to keep it
      const uint32_t row = thread / 32 * 16 + thread % 32 / 4, first_half = row % 2;
      source = first_half * kHalfBytes + thread * sizeof(uint4);
      exponents = Mxfp4::kCodeBytes + thread / 2 * sizeof(uint32_t);
      order = first_half == 0 ? 0x3210 : 0x1032;
      place = swizzled_offset(row, (thread % 4 + 4 * first_half) * sizeof(uint4));
    }
  };
  struct Words {
    uint4 half[2];
    uint32_t exponents;
  };
  __device__ __forceinline__ Words load(const Lane& lane, int number) const {
    const uint8_t* plane = map_.landing(codes_.stage) + number * Mxfp4::kPlaneBytes;
    return {{*reinterpret_cast<const uint4*>(plane + lane.source),
             *reinterpret_cast<const uint4*>(plane + (lane.source ^ kHalfBytes))},
            *reinterpret_cast<const uint32_t*>(plane + lane.exponents)};
  }

  // Planes from `first` on. `next`: the words of the first. Those of a plane are loaded before the last one's weights
  // are stored.
  template <int kCount>
  __device__ __forceinline__ void decode(Words& next, int first) const {
    const Lane lane;
    uint8_t* const to = map_.weights(to_.stage) + first * kPlaneRows * kBlockK;
#pragma unroll
    for (int p = 0; p < kCount; ++p) {
      const Words words = next;
      if (p + 1 < kCount) next = load(lane, first + p + 1);
      const uint32_t exponents = __byte_perm(words.exponents, 0, lane.order);
      uint8_t* const plane = to + p * kPlaneRows * kBlockK;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4 rows[2];
        decode_half(words.half[half], exponents, half, rows);
        store(rows, plane + (half == 0 ? lane.place : lane.place ^ kBlockK / 2));
      }
    }
  }

  // 16 columns of the low row and of the high one.
  __device__ __forceinline__ static void decode_half(const uint4& words, uint32_t exponents, int half,
                                                     uint4 (&rows)[2]) {
    const E2m1Table low(exponents, 2 * half, E2m1Constants()), high(exponents, 2 * half + 1, E2m1Constants());
    low.decode(words.x, rows[0].x, rows[0].y);
    low.decode(words.z, rows[0].z, rows[0].w);
    high.decode(words.y, rows[1].x, rows[1].y);
    high.decode(words.w, rows[1].z, rows[1].w);
  }
  __device__ __forceinline__ static void store(const uint4 (&rows)[2], uint8_t* to) {
    *reinterpret_cast<uint4*>(to) = rows[0];
    *reinterpret_cast<uint4*>(to + 8 * kBlockK) = rows[1];
  }

  const MoeArguments& args_;
  const SharedMap<Orientation>& map_;
  StageCursor codes_, to_;
};

}  // namespace megamoe
