// Dispatch: quantise the own tokens to E4M3 and write each into the image of every chunk it belongs to, on any rank; or
// once, as a row, where rows are gathered or images assembled.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/bf16.cuh"
#include "common/fp8.cuh"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/l2.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory_order.cuh"
#include "common/ptx/warp.cuh"
#include "kernels/images.cuh"
#include "kernels/places.cuh"
#include "kernels/plan.cuh"
#include "kernels/row_gather.cuh"
#include "kernels/shared_map.cuh"
#include "kernels/signals.cuh"
#include "kernels/trace.cuh"
#include "kernels/word_transpose.cuh"

namespace megamoe {

// Work is cut into (token, 256 or 512 hidden columns) items, one warp each, in contiguous shares per CTA.
struct DispatchShare {
  Divisor blocks;  // items per token
  int first_item;
  int end_item;

  // Of the CTA at `place`.
  __device__ DispatchShare(const MoeArguments& args, int place) : blocks(args.constants.dispatch_blocks) {
    const int items = args.problem.num_tokens * blocks.value();  // x would need a terabyte to overflow this
    first_item = min(items, place * args.constants.dispatch_items_per_cta);
    end_item = min(items, first_item + args.constants.dispatch_items_per_cta);
  }

  __device__ int token_of(int item) const { return blocks.divide(item); }
  __device__ int first_item_of(int token) const { return token * blocks.value(); }
  __device__ int first_token() const { return token_of(first_item); }
  __device__ int end_token() const { return token_of(end_item + blocks.value() - 1); }
};

// A warp's place among the items of its CTA's share.
struct DispatchCursor {
  int item;
  int token;
  int block;  // of the token's columns

  __device__ DispatchCursor(const DispatchShare& share, int first)
      : item(first), token(share.token_of(first)), block(first - share.first_item_of(token)) {}
  __device__ __forceinline__ void advance(const DispatchShare& share) {
    item += kConsumerWarps;
    for (block += kConsumerWarps; block >= share.blocks.value(); block -= share.blocks.value()) ++token;
  }
};

// Piece by piece of eight columns: lane l has pieces l, and l + 32 where an item is 512 columns.
template <typename Orientation>
struct ItemPieces {
  static constexpr int kPieces = Orientation::kDispatchColumns / 8 / 32;
  uint4 piece[kPieces];
};

// Where a piece of an item is, as the caller has it; null where there is none.
template <typename Orientation>
__device__ __forceinline__ const uint16_t* piece_of_item(const MoeArguments& args, const DispatchShare& share,
                                                         const DispatchCursor& at, int piece) {
  const int column = at.block * Orientation::kDispatchColumns + piece * 8;
  if (at.item >= share.end_item || column >= args.problem.hidden_size) return nullptr;
  return args.x + static_cast<size_t>(at.token) * args.problem.hidden_size + column;
}

// A warp's first item, loaded before anything else.
template <typename Orientation>
__device__ __forceinline__ ItemPieces<Orientation> load_first_item(const MoeArguments& args,
                                                                   const DispatchShare& share) {
  const DispatchCursor at(share, share.first_item + threadIdx.x / 32);
  ItemPieces<Orientation> item;
#pragma unroll
  for (int i = 0; i < ItemPieces<Orientation>::kPieces; ++i) {
    const uint16_t* source = piece_of_item<Orientation>(args, share, at, threadIdx.x % 32 + 32 * i);
    item.piece[i] = source == nullptr ? make_uint4(0, 0, 0, 0) : __ldg(reinterpret_cast<const uint4*>(source));
  }
  return item;
}

// A warp's items on their way through shared memory: registers would be waited for as soon as they changed places. The
// memory is the token parts of the ring, which are empty until all tokens are dispatched. Two warps share a stage,
// which has 2 KB for swapAB's two items each and 8 KB for the normal orientation's four, or three warps one of 16 KB.
template <typename Orientation>
class ItemStream {
  static constexpr int kItems = Orientation::kItemsInFlight;
  static constexpr int kPieces = ItemPieces<Orientation>::kPieces;
  static constexpr int kItemBytes = kPieces * 32 * static_cast<int>(sizeof(uint4));

 public:
  // `first` has come already.
  __device__ __forceinline__ ItemStream(const MoeArguments& args, const DispatchShare& share,
                                        const SharedMap<Orientation>& map, const DispatchCursor& at,
                                        const ItemPieces<Orientation>& first)
      : args_(args), share_(share), ahead_(at) {
    const int warp = threadIdx.x / 32;
    const int warps_per_stage = ceil_div(kConsumerWarps, map.num_stages);
    buffer_ = map.tokens(warp / warps_per_stage) + warp % warps_per_stage * kItems * kItemBytes;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) *place(0, threadIdx.x % 32 + 32 * i) = first.piece[i];
    ptx::commit_copies();
    ahead_.advance(share);
    for (slot_ = 1; slot_ < kItems; ++slot_) issue();
    slot_ = 0;
  }

  // The next item: a lane's 8 or 16 columns in a row.
  __device__ __forceinline__ ItemPieces<Orientation> next() {
    ptx::wait_copies<kItems - 1>();
    __syncwarp();
    ItemPieces<Orientation> item;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) item.piece[i] = *place(slot_, threadIdx.x % 32 * kPieces + i);
    __syncwarp();
    issue();
    slot_ = slot_ + 1 == kItems ? 0 : slot_ + 1;
    return item;
  }

 private:
  __device__ __forceinline__ uint4* place(int slot, int piece) const {
    return reinterpret_cast<uint4*>(buffer_ + slot * kItemBytes) + piece;
  }

  __device__ __forceinline__ void issue() {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = threadIdx.x % 32 + 32 * i;
      const uint16_t* source = piece_of_item<Orientation>(args_, share_, ahead_, piece);
      if (source != nullptr) ptx::copy_async_16(place(slot_, piece), source, true);
    }
    ptx::commit_copies();
    ahead_.advance(share_);
  }

  const MoeArguments& args_;
  const DispatchShare& share_;
  DispatchCursor ahead_;
  uint8_t* buffer_;
  int slot_;
};

// Ids and weights of the next 32 routes that are to be placed, loaded before they are needed.
struct RoutesAhead {
  int expert = -1;
  float weight = 0.0f;

  // A warp, of routes [first, end).
  __device__ __forceinline__ void load(const MoeArguments& args, int first, int end) {
    const int route = first + static_cast<int>(threadIdx.x % 32);
    expert = route < end ? __ldg(args.topk_ids + route) : -1;
    weight = route < end ? __ldg(args.topk_weights + route) : 0.0f;
  }
};

// Finds the image row of every route of tokens [token_begin, token_end) by counting earlier routes of the same expert.
// One warp; advances plan.before. Batches go in order, so positions depend on the ids alone, not on timing. `ahead`
// holds the first routes, and afterwards the first ones after these tokens.
template <typename Orientation, typename Group>
__device__ __forceinline__ void place_routes(const MoeArguments& args, const Plan& plan, const DispatchShare& share,
                                             int token_begin, int token_end, RoutesAhead& ahead,
                                             typename SharedMap<Orientation>::Target* targets) {
  using Target = typename SharedMap<Orientation>::Target;
  constexpr int kTile = Orientation::kTokenTile;
  const int lane = threadIdx.x % 32;
  const int top_k = args.problem.top_k;
  const int first_route = token_begin * top_k;
  const int end_route = token_end * top_k;
  const int k_blocks = args.problem.hidden_size / kBlockK;
  for (int base = first_route; base < end_route; base += 32) {
    const int route = base + lane;
    int expert = route < end_route ? ahead.expert : -1;
    const float weight = ahead.weight;
    ahead.load(args, min(base + 32, end_route), share.end_token() * top_k);
    if (expert < 0 || expert >= plan.group_experts() || !Group::has_ids()) expert = -1;
    const uint32_t peers = __match_any_sync(~0u, expert);
    const int earlier = __popc(peers & ((1u << lane) - 1));
    Target target = Target::unused();
    int position = 0;
    if (expert >= 0) position = plan.before(expert) + earlier;
    __syncwarp();
    if (expert >= 0) {
      if (earlier == 0) plan.before(expert) = position + __popc(peers);
      const int chunk = position / kTile;
      const int row = position - chunk * kTile;
      const int padded = round_up(min(kTile, plan.count(expert) - chunk * kTile), 8);
      const int rank = Group::rank_of_expert(args, expert);
      const int chunk_row_base = plan.row_base(expert) + chunk * kTile;
      // All images together have fewer than 2^32 bytes, as scratch memory has a limit (host/limits.h).
      target = Target::at(rank, Image::first_row(chunk_row_base, k_blocks), row, padded);
      // One CTA, the owner of the token's first columns, leaves the row's source for the epilogues.
      if (share.first_item_of(route / top_k) >= share.first_item) {
        Group::on(rank, args.workspace.row_sources)[chunk_row_base + row] = {Group::route_with_rank(args, route),
                                                                             weight * args.routed_scaling_factor};
      }
    }
    __syncwarp();
    if (route < end_route) targets[route - first_route] = target;
  }
}

// An item's columns of a lane as numbers, and the largest magnitude of the 128 columns that they are among. A warp.
template <typename Orientation>
__device__ __forceinline__ float item_values(const ItemPieces<Orientation>& item,
                                             float (&values)[8 * ItemPieces<Orientation>::kPieces]) {
  constexpr int kPieces = ItemPieces<Orientation>::kPieces;
  constexpr int kLanesPerScale = kBlockK / (8 * kPieces);
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      values[8 * i + j] = bf16::value(item.piece[i], j);
      amax = fmaxf(amax, fabsf(values[8 * i + j]));
    }
  }
#pragma unroll
  for (int offset = kLanesPerScale / 2; offset > 0; offset /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, offset));
  }
  return amax;
}

template <int kWords>
__device__ __forceinline__ void quantize_values(const float (&values)[4 * kWords], float scale,
                                                uint32_t (&bytes)[kWords]) {
  const float reciprocal = fp8::reciprocal(scale);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    float q[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) q[j] = fp8::quotient(values[4 * i + j], scale, reciprocal);
    bytes[i] = fp8::pack2(q[0], q[1]) | static_cast<uint32_t>(fp8::pack2(q[2], q[3])) << 16;
  }
}

// Quantises one item of a token (lane: 8 or 16 columns; as many lanes as have 128 columns: one scale) and stores it:
// as a row, or for each of the token's used slots into an image. Where rows are gathered, they go to each rank once, and
// their scales into images.
template <typename Orientation, typename Group>
__device__ __forceinline__ void dispatch_item(const MoeArguments& args, const DispatchCursor& at,
                                              const ItemPieces<Orientation>& item,
                                              const typename SharedMap<Orientation>::Target* token_targets) {
  constexpr int kPieces = ItemPieces<Orientation>::kPieces;
  constexpr int kLanesPerScale = kBlockK / (8 * kPieces);
  const Problem& p = args.problem;
  const int lane = threadIdx.x % 32;
  const int column = at.block * Orientation::kDispatchColumns + lane * 8 * kPieces;

  // Scale and quantise.
  float values[8 * kPieces];
  const float amax = item_values<Orientation>(item, values);
  [[maybe_unused]] const uint32_t lanes =
      Orientation::kTransposesColumns ? __ballot_sync(~0u, column < p.hidden_size) : 0;
  if (column >= p.hidden_size) return;
  const float scale = fp8::token_scale(amax);
  uint32_t bytes[2 * kPieces];
  quantize_values(values, scale, bytes);

  // Store: once as a row, or for every used slot into an image.
  const uint32_t k_block = column / kBlockK;
  int image_column = column;
  if constexpr (Orientation::kTransposesColumns) transpose_words(lanes, bytes, image_column);
  const bool gathers = gathers_rows<Orientation, Group>(args), assembles = assembles_images<Orientation, Group>(args);
  if constexpr (kPieces == 2) {
    const uint4 packed = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
    if (assembles) {
      const size_t place = static_cast<size_t>(at.token) * p.hidden_size + column;
      *reinterpret_cast<uint4*>(Group::own(args.workspace.token_rows) + place) = packed;
      if (lane % kLanesPerScale == 0) Group::own(args.workspace.row_scales)[place / kBlockK] = scale;
      return;
    }
    if (gathers && !Group::kHasPeers) ptx::store_keep(token_row<Group>(args, 0, at.token) + column, packed);
  }
  // Some slots at a time, without branches, so that the loads of their targets overlap.
  constexpr int kSlotsAtOnce = 3;
  [[maybe_unused]] uint32_t ranks_sent = 0;  // those that have the row
#pragma unroll 1
  for (int slot = 0; slot < p.top_k; slot += kSlotsAtOnce) {
    typename SharedMap<Orientation>::Target target[kSlotsAtOnce];
    uint8_t* place[kSlotsAtOnce];
    float* scales[kSlotsAtOnce];
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i) target[i] = token_targets[min(slot + i, p.top_k - 1)];
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i) {
      place[i] = Group::on(target[i].rank(), args.workspace.token_planes) + target[i].byte(k_block, image_column);
      scales[i] = Group::on(target[i].rank(), args.workspace.token_scales) + target[i].row(k_block);
    }
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i) {
      const bool used = slot + i < p.top_k && target[i].used();
      if (used && !gathers) {
        if constexpr (kPieces == 1) {
          ptx::store(place[i], make_uint2(bytes[0], bytes[1]), !Group::kHasPeers);
        } else {
          *reinterpret_cast<uint4*>(place[i]) = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
        }
      }
      if constexpr (kMayGatherRows<Orientation, Group> && Group::kHasPeers) {
        const uint32_t rank = 1u << target[i].rank();
        if (used && gathers && (ranks_sent & rank) == 0) {
          ranks_sent |= rank;
          *reinterpret_cast<uint4*>(token_row<Group>(args, target[i].rank(), at.token) + column) =
              make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
        }
      }
      if (used && lane % kLanesPerScale == 0) *scales[i] = scale;
    }
  }
}

// One share of the tokens, into the images; all consumer threads. `first` is the warp's first item and `routes` are
// warp 0's first routes, both loaded before. Ends by counting the share as done, for all CTAs to know.
template <typename Orientation, typename Group>
__device__ __forceinline__ void dispatch_share(const MoeArguments& args, const Plan& plan, const DispatchShare& share,
                                               const ItemPieces<Orientation>& first, RoutesAhead& routes,
                                               const SharedMap<Orientation>& map, Signaller<Orientation>& signaller,
                                               Tracer& tracer) {
  const int warp = threadIdx.x / 32;
  const int top_k = args.problem.top_k;
  const int tokens_per_batch = kRouteBatch / top_k;
  const int end_token = share.end_token();
  typename SharedMap<Orientation>::Target* targets = map.route_targets();
  DispatchCursor at(share, share.first_item + warp);
  ItemStream<Orientation> items(args, share, map, at, first);
  for (int token_begin = share.first_token(); token_begin < end_token; token_begin += tokens_per_batch) {
    const int token_end = min(token_begin + tokens_per_batch, end_token);
    if (warp == 0) place_routes<Orientation, Group>(args, plan, share, token_begin, token_end, routes, targets);
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    tracer.mark_by_first(TraceEvent::kPlaced);
    const int end_item = min(share.end_item, share.first_item_of(token_end));
    for (; at.item < end_item; at.advance(share)) {
      dispatch_item<Orientation, Group>(args, at, items.next(), targets + (at.token - token_begin) * top_k);
    }
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
  }
  tracer.mark_by_first(TraceEvent::kStored);
  // The images are read by the copy engine of every SM, the items' memory is written by it.
  ptx::fence_proxy_async_global();
  ptx::fence_proxy_async_shared();
  ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
  if (threadIdx.x == 0) {
    uint32_t* counter = SharedMap<Orientation>::counters(args).dispatched_shares();
    if constexpr (Group::kHasPeers) {
      signaller.post(counter);
    } else {
      ptx::add_release(counter, 1);
    }
  }
}

// Tells the token producers of the cluster's CTAs that this CTA dispatches no more: they may fill stages with tokens.
// All consumers, once they are through with the CTA's own share.
template <typename Orientation>
__device__ __forceinline__ void end_dispatch(const MoeArguments& args) {
  if (kEveryLaneArrives || threadIdx.x == 0) {
    for (uint32_t rank = 0; rank < Cluster<Orientation>(args).ctas(); ++rank) {
      ptx::mbarrier_arrive_in_cluster(&shared_header().dispatched, rank);
    }
  }
}

// The next share of a CTA that has not started, from `place` on; past the last one: there is none any more. All
// consumers.
template <typename Orientation>
__device__ __forceinline__ int take_vacant_share(const MoeArguments& args, const SharedMap<Orientation>& map,
                                                 int place) {
  int* const taken = reinterpret_cast<int*>(map.row_amax());  // scratch, nobody's while tokens are dispatched
  const int places = static_cast<int>(gridDim.x);
  ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
  if (threadIdx.x == 0) {
    while (place < places && !take_over(args.control->share_claims + place)) ++place;
    *taken = place;
  }
  ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
  place = *taken;
  ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
  return place;
}

// The shares of CTAs that have not started, once the token producer has requested it. It fills no stage until they are
// done, and no stage of any CTA has tokens before all shares are dispatched: the items' memory is free. All consumers.
template <typename Orientation, typename Group>
__device__ __forceinline__ void dispatch_vacant_shares(const MoeArguments& args, const Plan& plan,
                                                       const SharedMap<Orientation>& map,
                                                       Signaller<Orientation>& signaller, Tracer& tracer) {
  int place = -1;
#pragma unroll 1
  while ((place = take_vacant_share(args, map, place + 1)) < static_cast<int>(gridDim.x)) {
    const DispatchShare share(args, place);
    const int first_route = share.first_token() * args.problem.top_k;
    recount_before<Group>(args, plan, Group::route_in_group(args, first_route));
    RoutesAhead routes;
    if (threadIdx.x / 32 == 0) routes.load(args, first_route, share.end_token() * args.problem.top_k);
    dispatch_share<Orientation, Group>(args, plan, share, load_first_item<Orientation>(args, share), routes, map,
                                       signaller, tracer);
  }
  if (kEveryLaneArrives || threadIdx.x == 0) ptx::mbarrier_arrive(&map.header().vacant_shares_done);
  ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);  // all of them see it
}

}  // namespace megamoe
