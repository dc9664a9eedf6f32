// A launch's only token, where weights are decoded. Each CTA quantises it for itself, into an image in its own shared
// memory, instead of a share of it for all CTAs: so none waits until all have dispatched, which takes longer than the
// first weights do. The image serves the gate/up units of all experts, from where it is. It has the token in each of its
// eight rows, since a token may name an expert several times.
#pragma once

#include <cstdint>

#include "kernels/dispatch.cuh"

namespace megamoe {

template <typename Orientation, typename Group>
constexpr bool kMayHaveLoneToken = Orientation::kMayHaveLoneToken && !Group::kHasPeers;

template <typename Orientation, typename Group>
__device__ __forceinline__ bool has_lone_token(const MoeArguments& args) {
  return kMayHaveLoneToken<Orientation, Group> && args.constants.has_lone_token;
}

// What a consumer warp has of it: items `warp`, `warp` + 8 and so on. Nothing where there is no lone token.
template <typename Orientation, typename Group>
class LoneToken {
 public:
  // Before anything else; all items but the first.
  __device__ __forceinline__ void load(const MoeArguments& args) {
    if constexpr (kMayHaveLoneToken<Orientation, Group>) {
      if (!args.constants.has_lone_token) return;
#pragma unroll
      for (int i = 1; i < kMostItems; ++i) {
        const int column = first_column(i) + threadIdx.x % 32 * 8;
        if (column < args.problem.hidden_size) items_[i - 1] = __ldg(reinterpret_cast<const uint4*>(args.x + column));
      }
    }
  }

  __device__ __forceinline__ void quantize(const MoeArguments& args, ItemPieces<Orientation>& first) {
    if constexpr (kMayHaveLoneToken<Orientation, Group>) {
      if (args.constants.has_lone_token) quantize_items(args, first);
    }
  }

 private:
  static constexpr int kMostItems = kMostColumnsOfLoneToken / (kConsumerWarps * Orientation::kDispatchColumns);

  // Of the warp's item number `i`.
  __device__ static int first_column(int i) {
    return (threadIdx.x / 32 + i * kConsumerWarps) * Orientation::kDispatchColumns;
  }

  __device__ __forceinline__ void quantize_items(const MoeArguments& args, ItemPieces<Orientation>& item) {
    static_assert(ItemPieces<Orientation>::kPieces == 1);
    const Image image = SharedMap<Orientation>::lone_token(args.problem.hidden_size);
    // A rolled loop, whose next item comes to the front: to fetch instructions would delay the first weights.
#pragma unroll 1
    for (int i = 0; first_column(i) < args.problem.hidden_size; ++i) {
      const int column = first_column(i) + threadIdx.x % 32 * 8;
      // An odd number of K blocks: what fills the last stage adds zero.
      float values[8], scale = 0.0f;
      uint32_t bytes[2] = {};
      const float amax = item_values<Orientation>(item, values);
      if (column < args.problem.hidden_size) {
        scale = fp8::token_scale(amax);
        quantize_values(values, scale, bytes);
      }
      int image_column = column;
      transpose_words(~0u, bytes, image_column);
#pragma unroll
      for (int row = 0; row < kLoneTokenRows; ++row) {
        uint8_t* const place = image.plane(column / kBlockK) + swizzled_offset(row, image_column % kBlockK);
        *reinterpret_cast<uint2*>(place) = make_uint2(bytes[0], bytes[1]);
      }
      if (column % kBlockK == 0) {
        float4* const scales = reinterpret_cast<float4*>(image.scales(column / kBlockK));
        scales[0] = scales[1] = make_float4(scale, scale, scale, scale);
      }
      item.piece[0] = items_[0];
#pragma unroll
      for (int next = 1; next < kMostItems - 1; ++next) items_[next - 1] = items_[next];
    }
  }

  uint4 items_[kMostItems - 1];  // the next ones
};

// The token's rows, once the plan is complete; all consumers. The same in each CTA, and each reads its own.
template <typename Orientation, typename Group>
__device__ __forceinline__ void dispatch_lone_token(const MoeArguments& args, const Plan& plan,
                                                    const DispatchShare& share, RoutesAhead& routes,
                                                    const SharedMap<Orientation>& map) {
  if (threadIdx.x / 32 == 0) place_routes<Orientation, Group>(args, plan, share, 0, 1, routes, map.route_targets());
  ptx::fence_proxy_async_shared();  // WGMMA reads the image
  ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
}

}  // namespace megamoe
