// The weight producer: one thread that streams weights as stages become free, and waits for nothing else.
//
//   run               ticket after ticket, until there are no more
//   load_unit           a unit: stage after stage
//     stream              where its weights and scales are
//     claim                 wait until few enough copies are in flight and the stage is free
//     load_stage            copies of two K blocks, or of one
//     announce              the token producer may fill the stage's other part
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/ptx/bulk_copy.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory_order.cuh"
#include "kernels/prefetch.cuh"
#include "kernels/ring.cuh"
#include "kernels/schedule.cuh"
#include "kernels/shared_map.cuh"
#include "kernels/tickets.cuh"
#include "kernels/trace.cuh"

namespace megamoe {

template <typename Orientation>
class WeightProducer {
 public:
  __device__ WeightProducer(const MoeArguments& args, const SharedMap<Orientation>& map)
      : args_(args), map_(map), cluster_(args), experts_(args) {}

  // One thread.
  __device__ __forceinline__ void run(const UnitSchedule<Orientation>& schedule) {
    Tracer tracer(args_, TraceRole::kWeightProducer);
    const uint32_t rank = cluster_.rank();
    // The start and the end are most of a launch of few units, and there flags and tokens must not queue behind
    // weights.
    const bool few_units = Orientation::kSwapsOperands && schedule.num_gate_up() <= kFewUnitsPerCta * gridDim.x;
    most_in_flight_ = few_units ? Orientation::kLeastStagesInFlight : args_.constants.stages_in_flight;
    if constexpr (Orientation::kMayHaveLoneToken) {
      if (args_.constants.has_lone_token) {
        most_in_flight_ = Orientation::kLeastStagesInFlight;
        stages_at_start_ = 0;  // no tokens are on their way
      }
    }
    UnitTickets<Orientation> tickets(args_, cluster_, schedule);
    const bool no_units = cluster_.has_partner() && map_.header().ids_missing != 0;
    uint32_t ticket = no_units ? tickets.kEnd : tickets.first();
    bool settled = tickets.is_unit(ticket);
    // Unit after unit. The common case comes first, so that the rare ones lie behind it in the code.
    for (uint32_t number = 0;;) {
      if (settled) {
        const Unit u = schedule.unit(ticket, rank);
        tracer.mark(u.down ? TraceEvent::kDownIssued : TraceEvent::kGateUpIssued);
        ++number;
        uint32_t drawn;
        if (Orientation::kSwapsOperands && u.down && few_units) {
          drawn = load_unit<Orientation::kSwapsOperands>(schedule, u, tickets, number);
        } else {
          drawn = load_unit<false>(schedule, u, tickets, number);
        }
        ticket = tickets.next(drawn, number);
        settled = tickets.is_unit(ticket);
      } else if (ticket != tickets.kEnd) {
        ticket = tickets.settle(ticket);
        settled = ticket != tickets.kEnd;
      } else {
        break;
      }
    }
    // A last stage, which says that there are no more units.
    claim();
    Landing::note(cursor_.stage).set_end();
    if constexpr (Orientation::kHasDecoders) {
      UnitNote end = {};
      end.set_end();
      tell_token_producer(end);
    }
    ptx::mbarrier_arrive(Landing::full(cursor_.stage));
    announce();
    if (cluster_.has_partner()) await_last_releases();
  }

 private:
  using Format = typename Orientation::Format;
  using Landing = LandingRing<Orientation>;
  static constexpr int kPlaneBytes = Format::kPlaneBytes;
  static constexpr bool kRowScales = Format::kRowScales;
  static constexpr int kTileRowTerms = 2 * kPlaneRowTerms;  // floats

  // Where a unit's weights are: those of each tile follow each other, K block after K block. Worked out once for each
  // unit: the thread that issues the copies is on the critical path of every stage.
  struct Stream {
    const uint8_t* weights;  // the next K blocks of the first tile
    const float* scales;
    int k_blocks;
    bool down;
    bool once;           // is read once: leaves the L2 first
    bool shared;         // with the cluster's other CTA: each brings a tile to both
    size_t tile_bytes;   // from a tile to the next; 0 where the unit's last tile is the first one again
    int scale_distance;  // floats, likewise
  };

  // Returns what it draws for the next unit, which is number `next` of this CTA. With `kYields`, for down units, one
  // copy at a time is in flight until all gate/up units are complete, which leaves them the memory.
  template <bool kYields>
  __device__ __forceinline__ uint32_t load_unit(const UnitSchedule<Orientation>& schedule, const Unit& u,
                                                UnitTickets<Orientation>& tickets, uint32_t next) {
    const uint32_t rank = cluster_.rank();
    Stream s = stream(u);
    const auto note = UnitNote::make(u.tile, u.chunk, u.row_base, u.rows, u.down, u.shares_tokens);
    bool yields = kYields;
    uint32_t drawn = 0;
    for (int block = 0; block < s.k_blocks; block += Orientation::kStageBlocks) {
      // The next ticket is drawn with the last stage: early enough to be here at the unit's end, and late enough not to
      // reserve a unit for long.
      if (block + Orientation::kStageBlocks >= s.k_blocks) drawn = tickets.draw(next);
      // The ring is full for the first time: tokens have not come yet. Those of two CTAs are enough for the memory.
      if (Orientation::kSwapsOperands && !Orientation::kHalves && !kYields && claimed_ == map_.num_stages && !u.down)
        prefetch_until_free(s, block);
      if constexpr (kYields) {
        if (yields) yields = !gate_up_complete(schedule);
        while (yields && in_flight_ > 0) await_oldest();
      }
      claim();
      if (block == 0) {
        Landing::note(cursor_.stage) = note;
        if constexpr (Orientation::kHasDecoders) {
          map_.header().codes.shared[cursor_.stage] = s.shared;
          tell_token_producer(note);
        }
      }
      load_stage(s, block, rank);
      announce();
    }
    return drawn;
  }

  __device__ __forceinline__ Stream stream(const Unit& u) const {
    const Problem& p = args_.problem;
    Stream s;
    s.down = u.down;
    s.shared = u.shares_weights;
    // Weights that are read once leave the L2 first, so that slots and activations stay in it.
    s.once = Orientation::kSwapsOperands || (u.only_chunk && (u.down || args_.constants.activations_stay));
    s.k_blocks = (u.down ? p.intermediate_size : p.hidden_size) / kBlockK;
    s.tile_bytes = static_cast<size_t>(s.k_blocks) * Orientation::kBlockWeightBytes;

    // Where the expert's tile, or its two tiles, begin.
    const size_t expert = experts_.in_array(u.expert);
    const bool is_shared = experts_.is_shared(u.expert);
    const ExpertWeights &own = args_.weights, &shared = args_.shared_weights;
    if (u.down) {
      const int tile_pairs = p.hidden_size / kDownUnitColumns;
      const int vectors = ceil_div(s.k_blocks, 2);
      const size_t tile_pair = expert * tile_pairs + u.tile * Orientation::kUnitTiles;
      s.weights = (is_shared ? shared.down : own.down) + tile_pair * s.tile_bytes;
      s.scales = (is_shared ? shared.down_scale : own.down_scale) +
                 (kRowScales ? tile_pair * kTileRowTerms : 2 * tile_pair * vectors * kScaleVectorFloats);
      s.scale_distance = kRowScales ? kTileRowTerms : 2 * vectors * kScaleVectorFloats;
      // An odd last one comes twice: its copy is multiplied and dropped.
      if ((u.tile + 1) * Orientation::kUnitTiles > tile_pairs) s.tile_bytes = s.scale_distance = 0;
    } else {
      const size_t tile = (expert * args_.constants.gate_up_units.value() + u.tile) * Orientation::kUnitTiles;
      s.weights = (is_shared ? shared.gate_up : own.gate_up) + tile * s.tile_bytes;
      if constexpr (kRowScales) s.scale_distance = kTileRowTerms;
      // Those of blocks the tiles of a unit share.
      s.scales = (is_shared ? shared.gate_up_scale : own.gate_up_scale) +
                 (kRowScales ? tile * kTileRowTerms : tile * s.k_blocks * kScaleVectorFloats);
    }
    return s;
  }

  // Where gate/up units make only two rounds over the CTAs, most CTAs have down units already while the second is read,
  // and these wait for it anyway: they leave the memory to it. Units are taken chunk by chunk, so that the last chunk
  // is the last one to be complete.
  __device__ __forceinline__ bool gate_up_complete(const UnitSchedule<Orientation>& schedule) const {
    return ptx::load_relaxed(map_.counters(args_).units_done(schedule.num_chunks() - 1)) >=
           args_.constants.gate_up_units.value() * Orientation::kGateUpSignals;
  }

  // Waits for the oldest copies in flight.
  __device__ __forceinline__ void await_oldest() {
    await(Landing::full(oldest_.stage), oldest_.parity);
    oldest_.advance(num_stages());
    --in_flight_;
  }

  // Waits until one more stage of copies may be in flight, and until the stage at the cursor is free.
  __device__ __forceinline__ void claim() {
    if (in_flight_ >= (claimed_ < stages_at_start_ ? 1 : most_in_flight_)) await_oldest();
    ++claimed_;
    ++in_flight_;
    await(Landing::empty(cursor_.stage), cursor_.parity ^ 1);
  }

  // The stage with the end mark is never released; every other stage is. Wait for those, so that no arrival from the
  // partner hits a CTA that has exited.
  __device__ __forceinline__ void await_last_releases() {
    for (int i = 1; i < num_stages(); ++i, cursor_.advance(num_stages())) {
      await(Landing::empty(cursor_.stage), cursor_.parity ^ 1);
    }
  }

  // While the first tokens are being dispatched and no stage gets free, the memory would be idle: the unit's next
  // weights are brought into the L2, at about the pace at which the memory serves all SMs.
  __device__ __forceinline__ void prefetch_until_free(const Stream& s, int block) {
    constexpr int kPieceBytes = Orientation::kStageWeightBytes;
    const int bytes = min((s.k_blocks - block) * Orientation::kBlockWeightBytes, kMostBytesAheadOfRing);
    for (int prefetched = 0; prefetched + kPieceBytes <= bytes; prefetched += kPieceBytes) {
      const int64_t begin = clock64();
      while (clock64() - begin < kCyclesPerStageAheadOfRing) {
        if (ptx::mbarrier_test_wait(Landing::empty(cursor_.stage), cursor_.parity ^ 1)) return;
      }
      ptx::bulk_prefetch(s.weights + prefetched, kPieceBytes);
    }
  }

  __device__ int num_stages() const { return Landing::stages(map_.num_stages); }

  // Of units whose weights land elsewhere than its tokens.
  __device__ __forceinline__ void tell_token_producer(const UnitNote& note) {
    CodeRing& codes = map_.header().codes;
    await(&codes.note_empty[notes_.stage], notes_.parity ^ 1);
    codes.unit_note[notes_.stage] = note;
    ptx::mbarrier_arrive(&codes.note_full[notes_.stage]);
    notes_.advance(kUnitNotes);
  }

  // The stage is claimed: the token producer may fill its part.
  __device__ __forceinline__ void announce() {
    if constexpr (!Orientation::kHasDecoders) ptx::mbarrier_arrive(&map_.header().claimed[cursor_.stage]);
    cursor_.advance(num_stages());
  }

  // One copy of weights, with what the L2 is to do with them.
  __device__ __forceinline__ static void load(const Stream& s, uint8_t* destination, const uint8_t* source, int bytes,
                                              uint64_t* full) {
    if (s.once) {
      ptx::bulk_stream_global_to_shared(destination, source, bytes, full);
    } else if (!Orientation::kSwapsOperands && !Orientation::kHasDecoders && s.shared) {
      ptx::bulk_copy_global_to_cluster(destination, source, bytes, full, kBothCtas);
    } else {
      ptx::bulk_copy_global_to_shared(destination, source, bytes, full);
    }
  }

  // `whole` K blocks of `kBytes` each, which follow each other in memory and in the stage. What the stage has room for
  // beyond them is the last one again, so that the consumers multiply numbers.
  template <int kBytes>
  __device__ __forceinline__ static void load_blocks(const Stream& s, uint8_t* stage, const uint8_t* blocks, int whole,
                                                     uint64_t* full) {
    if constexpr (Orientation::kStageBlocks == 1) {
      load(s, stage, blocks, kBytes, full);
    } else {
      static_assert(Orientation::kStageBlocks == 2);
      load(s, stage, blocks, whole * kBytes, full);
      if (whole == 1) load(s, stage + kBytes, blocks, kBytes, full);
    }
  }

  // The scales and biases of the unit's rows, behind the weights of its first stage.
  __device__ __forceinline__ void load_row_terms(const Stream& s, uint8_t* stage, uint64_t* full) {
    constexpr int kTileBytes = kTileRowTerms * sizeof(float);
#pragma unroll
    for (int t = 0; t < Orientation::kUnitTiles; ++t) {
      ptx::bulk_copy_global_to_shared(stage + Orientation::kStageWeightBytes + t * kTileBytes,
                                      s.scales + t * s.scale_distance, kTileBytes, full);
    }
  }

  // K blocks [block, block + kStageBlocks) of the unit, whose stage is claimed.
  __device__ __forceinline__ void load_stage(Stream& s, int block, uint32_t rank) {
    const auto brings = [&](int tile) { return !s.shared || static_cast<int>(rank) == tile; };
    const int whole = min(Orientation::kStageBlocks, s.k_blocks - block);
    uint64_t* full = Landing::full(cursor_.stage);
    // Where weights are decoded, what the other CTA brings stays there until then.
    const int bytes =
        Orientation::kHasDecoders && s.shared ? Orientation::kStageWeightBytes / 2 : Orientation::kStageWeightBytes;
    uint8_t* stage = map_.landing(cursor_.stage);
    float* scales = map_.header().weight_scale[cursor_.stage];
    // Those that come with each stage, or for all rows with the first one.
    const int row_term_bytes = kRowScales && block == 0 ? Orientation::kRowTermBytes : 0;

    if (s.down) {
      // Down: for each tile its two planes, each with all K blocks of the stage, and scales for two K blocks.
      ptx::mbarrier_arrive_expect_tx(
          full, bytes + (kRowScales ? row_term_bytes : Orientation::kUnitTiles * kScaleVectorBytes));
#pragma unroll
      for (int t = 0; t < Orientation::kUnitTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!brings(t)) continue;
          load_blocks<kPlaneBytes>(s, stage + (2 * t + half) * Orientation::kStageBlocks * kPlaneBytes,
                                   s.weights + t * s.tile_bytes + half * (s.k_blocks * kPlaneBytes), whole, full);
        }
        if constexpr (!kRowScales) {
          ptx::bulk_copy_global_to_shared(scales + t * kScaleVectorFloats,
                                          s.scales + t * s.scale_distance + block / 2 * kScaleVectorFloats,
                                          kScaleVectorBytes, full);
        }
      }
      s.weights += Orientation::kStageBlocks * kPlaneBytes;
    } else {
      // Gate/up: for each tile K block after K block, of two planes each, and scales that the tiles share.
      const int scale_bytes = kRowScales ? row_term_bytes : whole * kScaleVectorBytes;
      ptx::mbarrier_arrive_expect_tx(full, bytes + scale_bytes);
#pragma unroll
      for (int t = 0; t < Orientation::kUnitTiles; ++t) {
        if (!brings(t)) continue;
        load_blocks<Orientation::kBlockWeightBytes>(
            s, stage + t * Orientation::kStageBlocks * Orientation::kBlockWeightBytes, s.weights + t * s.tile_bytes,
            whole, full);
      }
      if constexpr (!kRowScales) {
        ptx::bulk_copy_global_to_shared(scales, s.scales + block * kScaleVectorFloats, scale_bytes, full);
      }
      s.weights += Orientation::kStageBlocks * Orientation::kBlockWeightBytes;
    }
    if (kRowScales && block == 0) load_row_terms(s, stage, full);
  }

  const MoeArguments& args_;
  const SharedMap<Orientation>& map_;
  Cluster<Orientation> cluster_;
  ExpertNumbers experts_;
  int most_in_flight_ = 1;
  int stages_at_start_ = kStagesAtStart;
  StageCursor cursor_;
  StageCursor notes_;   // of the units that the token producer has been told of
  StageCursor oldest_;  // of the stages whose copies are in flight
  int claimed_ = 0;
  int in_flight_ = 0;
};

}  // namespace megamoe
