// What the consumer warpgroups do between dispatch and combine: unit after unit, out of the ring.
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/expected.cuh"
#include "kernels/dispatch.cuh"
#include "kernels/normal_consumer.cuh"
#include "kernels/places.cuh"
#include "kernels/plan.cuh"
#include "kernels/ring.cuh"
#include "kernels/shared_map.cuh"
#include "kernels/signals.cuh"
#include "kernels/swap_consumer.cuh"
#include "kernels/trace.cuh"

namespace megamoe {

// One unit: swapAB with the smallest token tile that holds its chunk.
template <typename Orientation, typename Group, int kN = 8>
__device__ __forceinline__ void consume_unit(const MoeArguments& args, const SharedMap<Orientation>& map,
                                             const UnitNote& note, Signaller<Orientation>& signaller, Tracer& tracer,
                                             StageCursor& cursor) {
  if constexpr (!Orientation::kSwapsOperands) {
    NormalConsumer<Orientation, Group>(args, map, note, signaller, tracer).run(cursor);
  } else {
    if constexpr (kN < Orientation::kTokenTile) {
      if (note.rows() > kN) return consume_unit<Orientation, Group, kN + 8>(args, map, note, signaller, tracer, cursor);
    }
    SwapConsumer<kN, Orientation, Group>(args, map, note, signaller, tracer).run(cursor);
  }
}

// Unit after unit, until a stage says that there are no more. swapAB returns false, before the first unit, if its
// tokens do not come because they are shares of CTAs that have not started.
template <typename Orientation, typename Group>
__device__ __forceinline__ bool consume(const MoeArguments& args, const SharedMap<Orientation>& map,
                                        Signaller<Orientation>& signaller, Tracer& tracer) {
  StageCursor cursor;
#pragma unroll 1
  while (true) {
    if constexpr (Orientation::kSwapsOperands) {
      await(&map.header().weights_full[cursor.stage], cursor.parity);
      if (!await_unless(&map.header().tokens_full[cursor.stage], cursor.parity, vacant_shares_wanted)) return false;
    } else {
      wait_stage(map.header(), cursor);
    }
    const UnitNote note = map.header().note[cursor.stage];
    tracer.mark_by_first(TraceEvent::kUnitLanded);
    if (note.end()) break;
    if constexpr (Orientation::kHalves) {
      if (threadIdx.x % 32 == 0) map.kept_note(threadIdx.x / 32) = note;
      __syncwarp();
    }
    consume_unit<Orientation, Group>(args, map, note, signaller, tracer, cursor);
    tracer.mark_by_first(TraceEvent::kUnitFinished);
  }
  if constexpr (Orientation::kHasDecoders) {
    // The partner has what it is sent from this CTA's stages, whose memory has another use from here on; and no arrival
    // of its consumers is on the way any more.
    if (Cluster<Orientation>(args).has_partner()) {
      for (int i = 1; i < map.num_stages; ++i) {
        cursor.advance(map.num_stages);
        await(&map.header().empty[cursor.stage], cursor.parity ^ 1);
      }
    }
  }
  if (threadIdx.x % kWarpgroupThreads == 0) signaller.post(nullptr);
  return true;
}

// All units; before them, the shares of tokens that no other CTA dispatches. swapAB looks for these while it waits for
// its first unit, which saves 1 % of a launch of 128 tokens; the normal orientation has no registers left for that.
template <typename Orientation, typename Group>
__device__ __forceinline__ void consume_all(const MoeArguments& args, const Plan& plan,
                                            const SharedMap<Orientation>& map, Signaller<Orientation>& signaller,
                                            Tracer& tracer) {
  if constexpr (Orientation::kSwapsOperands) {
#pragma unroll 1
    while (!expected(consume<Orientation, Group>(args, map, signaller, tracer))) {
      dispatch_vacant_shares<Orientation, Group>(args, plan, map, signaller, tracer);
    }
  } else {
    if (!expected(await_unless(&shared_header().tokens_full[0], 0, vacant_shares_wanted))) {
      dispatch_vacant_shares<Orientation, Group>(args, plan, map, signaller, tracer);
    }
    consume<Orientation, Group>(args, map, signaller, tracer);
  }
}

}  // namespace megamoe
