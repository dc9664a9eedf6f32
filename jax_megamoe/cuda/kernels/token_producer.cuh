// The token producer: adds the tokens to the stages that the weight producer has claimed, once they exist.
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/ptx/bulk_copy.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory_order.cuh"
#include "common/ptx/warp.cuh"
#include "kernels/images.cuh"
#include "kernels/lone_token.cuh"
#include "kernels/places.cuh"
#include "kernels/ring.cuh"
#include "kernels/row_gather.cuh"
#include "kernels/shared_map.cuh"
#include "kernels/trace.cuh"

namespace megamoe {

// Gate/up units need all tokens dispatched, or none brought where there is a lone one; down units the activations of
// their chunk. One thread; with `kRows` the two warps that gather the rows of gate/up units, of which the first brings
// what are images.
template <typename Orientation, typename Group, bool kRows>
class TokenProducer {
 public:
  __device__ TokenProducer(const MoeArguments& args, const SharedMap<Orientation>& map, int row_warp)
      : args_(args),
        map_(map),
        row_warp_(row_warp),
        rank_(Cluster<Orientation>(args).rank()),
        // Waited for already, or not at all.
        tokens_ready_(Group::kHasPeers || has_lone_token<Orientation, Group>(args)),
        tracer_(args, TraceRole::kTokenProducer) {}

  __device__ __forceinline__ void run() {
    await(&header().dispatched, 0);
    while (true) {
      const UnitNote note = await_unit();
      if (note.end()) break;
      if (!note.down() && !tokens_ready_) await_all_shares();
      if (note.rows() == 0 || (has_lone_token<Orientation, Group>(args_) && !note.down())) {
        skip_unit(note);
        continue;
      }
      await_tokens(note);
      if constexpr (kRows) {
        if (!note.down()) {
          gather_unit(note);
          continue;
        }
      }
      copy_unit(note);
    }
    if (leads()) ptx::mbarrier_arrive(full(), kArrivals);
  }

 private:
  static constexpr int kArrivals = kRows ? 32 : 1;  // at a stage, of the thread or of each warp
  // Where the number of K blocks is odd, the last stage has its block twice. Consumers of decoded weights add the copy up
  // like any other block, with scales of zero: to ask for it would take two instructions for each eight tokens and block.
  static constexpr bool kAddsCopies = Orientation::kSwapsOperands && Orientation::Format::kDecodes;

  __device__ static SharedHeader& header() { return shared_header(); }
  __device__ uint64_t* full() const { return &header().tokens_full[cursor_.stage]; }
  // The thread that brings images, or arrives for its warp.
  __device__ static bool leads() { return !kRows || ptx::elect_one(); }
  __device__ bool brings_images() const { return !kRows || row_warp_ == 0; }
  // Bytes of copies that come to the stage; with them, one thread arrives.
  __device__ __forceinline__ void expect(int bytes) const {
    if constexpr (kRows) {
      ptx::mbarrier_expect_tx(full(), bytes);
    } else {
      ptx::mbarrier_arrive_expect_tx(full(), bytes);
    }
  }
  __device__ int k_blocks(const UnitNote& note) const {
    return (note.down() ? args_.problem.intermediate_size : args_.problem.hidden_size) / kBlockK;
  }

  // The stage at the cursor.
  __device__ __forceinline__ void await_claim() {
    if constexpr (Orientation::kHasDecoders) {
      await(&header().empty[cursor_.stage], cursor_.parity ^ 1);
    } else {
      await(&header().claimed[cursor_.stage], cursor_.parity);
      if constexpr (kRows) __syncwarp();
    }
  }

  // The next unit, whose first stage is at the cursor.
  __device__ __forceinline__ UnitNote await_unit() {
    if constexpr (Orientation::kHasDecoders) {
      CodeRing& codes = header().codes;
      await(&codes.note_full[notes_.stage], notes_.parity);
      const UnitNote note = codes.unit_note[notes_.stage];
      ptx::mbarrier_arrive(&codes.note_empty[notes_.stage]);
      notes_.advance(kUnitNotes);
      await_claim();
      return note;
    } else {
      await_claim();
      return header().note[cursor_.stage];
    }
  }

  __device__ __forceinline__ void await_tokens(const UnitNote& note) {
    if (note.down() && brings_images()) {
      const uint32_t signals = args_.constants.gate_up_units.value() * Orientation::kGateUpSignals;
      Group::wait_local(args_, SharedMap<Orientation>::counters(args_).units_done(note.chunk), signals);
    }
    if constexpr (kMayAssembleImages<Orientation, Group>) {
      if (!note.down() && args_.constants.assembles_images) {
        const CounterSet& counters = SharedMap<Orientation>::counters(args_);
        Group::wait_local(args_, counters.assembled(note.chunk), note.padded_rows() / kAssemblyPieceRows);
        // The place of the unit's activations: units of the chunk that had it have lower tickets.
        const int earlier = note.chunk - static_cast<int>(args_.constants.activation_slots.value());
        if (earlier >= 0) {
          Group::wait_local(args_, counters.units_done(earlier),
                            args_.constants.gate_up_units.value() * Orientation::kGateUpSignals +
                                args_.constants.down_units.value() * Orientation::kDownSignals);
        }
      }
    }
    ptx::fence_proxy_async_global();
    if (brings_images() && threadIdx.x % 32 == 0) tracer_.mark(TraceEvent::kTokensReady);
    if constexpr (kRows) __syncwarp();
  }

  // Of one rank, before the first gate/up unit. Those of CTAs that have not started are taken over after a while.
  __device__ __forceinline__ void await_all_shares() {
    tokens_ready_ = true;
    const uint32_t* quantized = SharedMap<Orientation>::counters(args_).dispatched_shares();
    VacantShareWatch vacant_shares(args_);
    WaitLimit limit;
    while (true) {
      const bool here = ptx::load_acquire(quantized) >= gridDim.x;
      // The lanes go on together: only so, one of them leads.
      if (kRows ? __all_sync(~0u, here) : here) break;
      if (brings_images() && leads()) vacant_shares.check();
      limit.check();
    }
  }

  __device__ __forceinline__ void skip_unit(const UnitNote& note) {
    for (int block = 0; block < k_blocks(note); block += Orientation::kStageBlocks, cursor_.advance(map_.num_stages)) {
      if (block != 0) await_claim();
      if (leads()) ptx::mbarrier_arrive(full(), kArrivals);
    }
  }

  // The images of the unit's chunk, of tokens or of activations, and their scales.
  __device__ __forceinline__ void copy_unit(const UnitNote& note) {
    const int rows = note.padded_rows();
    const int blocks = k_blocks(note);
    const int scales_per_block = note.down() ? Orientation::kActivationScalesPerBlock : 1;
    // An Image, written out: through it, nvcc moves other code around.
    const int row_base = activation_row_base<Orientation, Group>(args_, note.chunk, note.row_base);
    const uint8_t* planes =
        (note.down() ? args_.workspace.activation_planes : Group::own(args_.workspace.token_planes)) +
        static_cast<size_t>(row_base) * (blocks * kBlockK);
    const float* scales = (note.down() ? args_.workspace.activation_scales : Group::own(args_.workspace.token_scales)) +
                          static_cast<size_t>(row_base) * blocks * scales_per_block;
    if constexpr (kMayAssembleImages<Orientation, Group>) {
      if (!note.down() && args_.constants.assembles_images) {
        const Image image = assembled_image(args_, note.chunk, rows, blocks);
        planes = image.plane(0);
        scales = image.scales(0);
      }
    }
    const int plane_bytes = rows * kBlockK;
    const int block_scales = scales_per_block * rows;
    const int scale_bytes = block_scales * static_cast<int>(sizeof(float));
    for (int block = 0; block < blocks; block += Orientation::kStageBlocks, cursor_.advance(map_.num_stages)) {
      if (block != 0) await_claim();
      if (leads()) {
        if (brings_images()) {
          const int whole = Orientation::kStageBlocks == 1 ? 1 : min(Orientation::kStageBlocks, blocks - block);
          uint8_t* stage_planes = map_.tokens(cursor_.stage);
          float* stage_scales = map_.token_scales(cursor_.stage);
          if constexpr (kAddsCopies) {
            if (whole < Orientation::kStageBlocks) clear(stage_scales + block_scales, block_scales);
            expect(Orientation::kStageBlocks * plane_bytes + whole * scale_bytes);
          } else {
            expect(Orientation::kStageBlocks * (plane_bytes + scale_bytes));
          }
          if (!Orientation::kSwapsOperands && note.shares_tokens()) {
            const int half = plane_bytes / 2, offset = rank_ * half;
            ptx::bulk_copy_global_to_cluster(stage_planes + offset, planes + offset, half, full(), kBothCtas);
          } else {
            ptx::bulk_copy_global_to_shared(stage_planes, planes, whole * plane_bytes, full());
          }
          ptx::bulk_copy_global_to_shared(stage_scales, scales, whole * scale_bytes, full());
          if (whole < Orientation::kStageBlocks) {  // as the weights do
            ptx::bulk_copy_global_to_shared(stage_planes + plane_bytes, planes, plane_bytes, full());
            if constexpr (!kAddsCopies)
              ptx::bulk_copy_global_to_shared(stage_scales + block_scales, scales, scale_bytes, full());
          }
        }
        if constexpr (kRows) ptx::mbarrier_arrive(full(), kArrivals);
      }
      planes += Orientation::kStageBlocks * plane_bytes;
      scales += Orientation::kStageBlocks * block_scales;
    }
  }

  // `floats` are a multiple of four.
  __device__ __forceinline__ static void clear(float* begin, int floats) {
#pragma unroll 1
    for (int i = 0; i < floats; i += 4) *reinterpret_cast<float4*>(begin + i) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    ptx::fence_proxy_async_shared();  // a copy overwrites them later
  }

  // The rows of the unit's tokens by both warps; their scales are an image.
  __device__ __forceinline__ void gather_unit(const UnitNote& note) {
    const int rows = note.padded_rows();
    const int blocks = k_blocks(note);
    const float* scales = token_image<Group>(args_, note, blocks).scales(0);
    const int scale_bytes = rows * static_cast<int>(sizeof(float));
    RowGather<Orientation, Group> gather(args_, map_, row_warp_, note);
#pragma unroll 1
    for (int block = 0; block < blocks; ++block, cursor_.advance(map_.num_stages)) {
      if (block != 0) await_claim();
      if (brings_images() && leads()) {
        expect(scale_bytes);
        ptx::bulk_copy_global_to_shared(map_.token_scales(cursor_.stage), scales, scale_bytes, full());
      }
      __syncwarp();
      gather.next_block(map_.tokens(cursor_.stage));
      ptx::mbarrier_arrive_after_copies(full());
      scales += rows;
    }
  }

  const MoeArguments& args_;
  const SharedMap<Orientation>& map_;
  int row_warp_;
  uint32_t rank_;
  bool tokens_ready_;
  Tracer tracer_;
  StageCursor cursor_;
  StageCursor notes_;
};

}  // namespace megamoe
