// The expert group: how ranks find each other's memory, announce what is done, and wait for it.
// OneRank has all experts; PeerRanks are GPUs that see each other's memory. The protocol is in docs/expert-parallel.md.
#pragma once

#include <cstdint>

#include "common/bounded_wait.cuh"
#include "common/ptx/clock.cuh"
#include "common/ptx/memory_order.cuh"
#include "common/ptx/warp.cuh"
#include "kernels/arguments.h"
#include "kernels/peer_wait.cuh"
#include "kernels/places.cuh"
#include "kernels/shared_header.cuh"

namespace megamoe {

// Where a rank may be slow: virtual ranks pause there in tests, to shuffle the order of events.
enum class DelayPoint : int { kBeforeIds, kBeforeDispatch, kBeforeTokensFlag, kBeforeColumnsFlag, kBeforeCombine };

// All experts on one device.
struct OneRank {
  static constexpr bool kHasPeers = false;

  // What a launch loads before anything else: the id of the thread's first route.
  struct Opening {
    int id;
    __device__ explicit Opening(const MoeArguments& args)
        : id(threadIdx.x < args.problem.num_routes() ? __ldg(args.topk_ids + threadIdx.x) : -1) {}
  };

  __device__ static int num_ranks(const MoeArguments&) { return 1; }
  __device__ static int rank(const MoeArguments&) { return 0; }
  __device__ static int rank_of_expert(const MoeArguments&, int) { return 0; }
  __device__ static uint16_t* slot_row(const MoeArguments& args, int route) {
    return args.workspace.slot_outputs + static_cast<size_t>(route) * args.problem.hidden_size;
  }
  __device__ static int route_with_rank(const MoeArguments&, int route) { return route; }
  // Counted over the group, of a route with its rank.
  __device__ static int token_of_route(const MoeArguments& args, int route) { return route / args.problem.top_k; }
  __device__ static int route_in_group(const MoeArguments&, int route) { return route; }
  __device__ static int id_of_route(const MoeArguments& args, int route) { return __ldg(args.topk_ids + route); }
  __device__ static bool has_ids() { return true; }
  __device__ static bool has_tokens() { return true; }
  template <typename T>
  __device__ static T* on(int, T* pointer) {
    return pointer;
  }
  template <typename T>
  __device__ static T* own(T* pointer) {
    return pointer;
  }
  __device__ static void start_late(const MoeArguments&) {}
  __device__ static void finish(const MoeArguments&) {}
  __device__ static void inject_delay(const MoeArguments&, DelayPoint) {}
  __device__ static void wait_local(const MoeArguments&, const uint32_t* counter, uint32_t target) {
    await_at_least(counter, target);
  }
};

struct PeerRanks {
  static constexpr bool kHasPeers = true;

  __device__ static int num_ranks(const MoeArguments& args) { return args.peers.num_ranks; }
  __device__ static int rank(const MoeArguments& args) { return args.peers.rank; }
  __device__ static int rank_of_expert(const MoeArguments& args, int expert) {
    return expert / args.problem.num_local_experts;
  }

  // Of the workspace that ranks share: `offset` is a place in it, as arguments have it.
  template <typename T>
  __device__ static T* on(int rank, T* offset) {
    return reinterpret_cast<T*>(shared_header().workspace[rank] + reinterpret_cast<uintptr_t>(offset));
  }
  template <typename T>
  __device__ static T* own(T* offset) {
    return reinterpret_cast<T*>(shared_header().own_workspace + reinterpret_cast<uintptr_t>(offset));
  }

  __device__ static int route_with_rank(const MoeArguments& args, int route) {
    return args.peers.rank << kRouteRankShift | route;
  }
  // Of [T, length] `rows` of the route's rank, the one of its token.
  template <typename T>
  __device__ static const T* row_of_route(const MoeArguments& args, const T* rows, int route, int length) {
    const int own = route & ((1 << kRouteRankShift) - 1);
    return on(route >> kRouteRankShift, rows) + static_cast<size_t>(own / args.problem.top_k) * length;
  }
  // Of what is no route, since tokens did not come: of some token, whose row is there to be read.
  __device__ static int token_of_route(const MoeArguments& args, int route) {
    const uint32_t own = route & ((1 << kRouteRankShift) - 1), tokens = args.problem.num_tokens;
    return min((route >> kRouteRankShift) * tokens + own / args.problem.top_k, args.peers.num_ranks * tokens - 1);
  }
  // Counted over the group.
  __device__ static int route_in_group(const MoeArguments& args, int route) {
    return args.peers.rank * args.problem.num_routes() + route;
  }
  // Where the result of a route goes: to the rank whose token it is. Of what is no route: nowhere, but some rank has to
  // be named.
  __device__ static uint16_t* slot_row(const MoeArguments& args, int route) {
    const size_t own = route & ((1 << kRouteRankShift) - 1);
    return on(route >> kRouteRankShift & (kMaxRanks - 1), args.workspace.slot_outputs) + own * args.problem.hidden_size;
  }

  // Work of this rank, which may have to wait for others first.
  __device__ static void wait_local(const MoeArguments& args, const uint32_t* counter, uint32_t target) {
    PeerWait wait(args.peers);
    while (ptx::load_acquire(counter) < target && wait.again(PeerFailure::kOwn, args.peers.rank)) {
    }
  }

  // One warp: waits for flags [rows][kMaxRanks], of the ranks that there are. Returns whether they came.
  // `meanwhile(rank)` is called again and again until they do.
  template <typename Meanwhile>
  __device__ static bool wait_for_ranks(const MoeArguments& args, const uint64_t* flags, int rows, uint64_t epoch,
                                        PeerFailure::Phase phase, Meanwhile&& meanwhile) {
    const int num_ranks = args.peers.num_ranks;
    bool came = true;
    for (int i = threadIdx.x % 32; i < rows * num_ranks; i += 32) {
      const int row = i / num_ranks, rank = i - row * num_ranks;
      PeerWait wait(args.peers);
      while (ptx::load_acquire_system(flags + row * kMaxRanks + rank) < epoch && came) {
        meanwhile(rank);
        came = wait.again(phase, rank);
      }
    }
    came = __all_sync(~0u, came);
    __syncwarp();  // a vote orders no memory: what one lane has observed, the others may read now
    return came;
  }

  // One warp, the token producer's: waits for the tokens of all ranks. Own ones that don't come may wait for CTAs that
  // have not started; those that do come find no stage that is still needed for dispatch.
  __device__ static void await_tokens(const MoeArguments& args) {
    await(&shared_header().dispatched, 0);
    VacantShareWatch vacant_shares(args);
    const bool came = wait_for_ranks(args, own_peer_header()->tokens_sent, 1, shared_header().epoch,
                                     PeerFailure::kTokens, [&](int rank) {
                                       if (rank == args.peers.rank) vacant_shares.check();
                                     });
    // Whichever lane brings tokens has seen that the consumers are through.
    if (__any_sync(~0u, vacant_shares.has_requested())) await(&shared_header().vacant_shares_done, 0);
    if (threadIdx.x % 32 == 0) shared_header().tokens_missing = !came || shared_header().ids_missing != 0;
    __syncwarp();  // before a thread of the warp releases the first tokens to the consumers
  }

  // The same for warps with few registers, in two parts: the token producer's warp waits, and one beside it (`watches`)
  // looks after shares of CTAs that have not started. They meet before tokens go to where these would be dispatched.
  __device__ static void await_watched_tokens(const MoeArguments& args, bool watches) {
    await(&shared_header().dispatched, 0);
    bool came = true;
    if (threadIdx.x % 32 == 0) {
      if (watches) {
        watch_vacant_shares(args);
      } else {
        came = await_tokens_in_turn(args);
      }
    }
    __syncwarp();
    ptx::named_barrier_sync(kTokensBarrier, 2 * 32);  // one instruction for both warps: synccheck wants it so
    if (watches) return;
    if (ptx::mbarrier_test_wait(&shared_header().vacant_shares_wanted, 0))
      await(&shared_header().vacant_shares_done, 0);
    if (threadIdx.x % 32 == 0) shared_header().tokens_missing = !came || shared_header().ids_missing != 0;
    __syncwarp();
  }

  // One warp, beside the token producer's: waits for the rows of all ranks. False: some do not come.
  __device__ static bool await_rows(const MoeArguments& args) {
    return wait_for_ranks(args, own_peer_header()->tokens_sent, 1, shared_header().epoch, PeerFailure::kTokens,
                          [](int) {}) &&
           has_ids();
  }

  // One thread, which has observed what is announced: sets this rank's place of `flags(header)` on every rank. A rank
  // that has failed announces nothing, since its data are of no use.
  template <typename Flags>
  __device__ static void announce(const MoeArguments& args, const Flags& flags, uint64_t epoch) {
    const uint64_t word = PeerWait::failure_word();
    ptx::fence_system();
    if (PeerWait::is_failure(args.peers, word)) return;
    for (int r = 0; r < args.peers.num_ranks; ++r) {
      ptx::store_relaxed_system(flags(peer_header(r)) + args.peers.rank, epoch);
    }
  }

  // What a launch loads before anything else, all at once: its number in the group, where the group's memory is, and
  // what the warp sends first.
  struct Opening {
    uint64_t epoch;
    uint64_t ids_bytes;
    uint8_t* workspace = nullptr;  // of the rank of the lane's number
    int mesh_rank = -1;
    int id = -1;  // of the lane's first route

    __device__ explicit Opening(const MoeArguments& args) {
      const PeerView* view = args.peers.view;
      epoch = __ldcg(&view->epoch) + 1;
      ids_bytes = __ldcg(&view->ids_bytes);
      const int lane = threadIdx.x % 32;
      if (lane < args.peers.num_ranks) workspace = reinterpret_cast<uint8_t*>(__ldcg(&view->workspace[lane]));
      if (args.peers.mesh_rank != nullptr) mesh_rank = __ldg(args.peers.mesh_rank);
      const int route = first_route_to_send() + lane;
      if (route < args.problem.num_routes()) id = __ldg(args.topk_ids + route);
    }
  };

  // Whether this rank is where the program takes it to be: else it would multiply other tokens by its weights than it
  // should.
  __device__ static bool in_order(const MoeArguments& args, int mesh_rank) {
    return mesh_rank < 0 || mesh_rank == args.peers.rank;
  }

  // Sends every rank the own ids, a word for each, which holds its epoch too: no flag, no fence. All warps of all CTAs.
  // A lane sends its route's word to all ranks, last to its own: who finds it there knows that it is under way.
  __device__ static void send_ids(const MoeArguments& args, const Opening& opening) {
    if (!in_order(args, opening.mesh_rank)) return;
    const int routes = args.problem.num_routes(), num_ranks = args.peers.num_ranks;
    int id = opening.id;
#pragma unroll 1
    for (int first = first_route_to_send(); first < routes; first += gridDim.x * kCtaThreads) {
      const int route = first + static_cast<int>(threadIdx.x % 32);
      if (first != first_route_to_send() && route < routes) id = __ldg(args.topk_ids + route);
      const uint64_t word = word_of_id(args, opening.epoch, id);
      int rank = args.peers.rank;
#pragma unroll 1
      do {
        rank = rank + 1 == num_ranks ? 0 : rank + 1;
        const uint64_t workspace = __shfl_sync(~0u, reinterpret_cast<uint64_t>(opening.workspace), rank);
        if (route < routes) {
          store_word(args, reinterpret_cast<uint8_t*>(workspace), opening.ids_bytes, opening.epoch, route, word);
        }
      } while (rank != args.peers.rank);
    }
  }

  // Ids of all ranks, in this rank's buffer.
  __device__ static const uint64_t* words(uint64_t epoch) {
    return PeerBuffer::ids(shared_header().own_workspace, shared_header().ids_bytes, epoch % 2);
  }

  // Whether a word holds an id of this launch, and which.
  __device__ static bool is_there(const MoeArguments& args, uint64_t epoch, uint64_t word) {
    return word >> 32 == word_tag(args, epoch);
  }
  __device__ static int id_of_word(uint64_t word) { return static_cast<int>(static_cast<uint32_t>(word)); }

  // Reads of a word, of a microsecond at most, before the bounded wait for it begins.
  static constexpr int kQuickTries = 64;

  // The id of a route, counted over the group, as soon as it is there; -1 if it does not come. An own word that does
  // not come was to be sent by a CTA that has not started: it is sent by all that miss it, which does no harm.
  __device__ static int await_id(const MoeArguments& args, uint64_t epoch, int route) {
    const int rank = route / args.problem.num_routes();
    PeerWait wait(args.peers);
    for (bool is_first = true;; is_first = false) {
      // A launch after one that has failed, of which there may be many, finds that out here: ids do not come then.
      const uint64_t failure = is_first ? PeerWait::failure_word() : 0;
      const uint64_t word = ptx::load_relaxed_system(words(epoch) + route);
      if (is_there(args, epoch, word)) return id_of_word(word);
      if (shared_header().ids_missing || PeerWait::is_failure(args.peers, failure) ||
          !wait.again(PeerFailure::kIds, rank)) {
        if (shared_header().ids_missing == 0) leave_group(args);
        shared_header().ids_missing = 1;
        return -1;
      }
      if (!is_first || rank != args.peers.rank) continue;
      const int mesh_rank = args.peers.mesh_rank == nullptr ? -1 : __ldg(args.peers.mesh_rank);
      if (in_order(args, mesh_rank)) {
        send_id(args, epoch, route - rank * args.problem.num_routes());
      } else {
        PeerWait::fail(args.peers, PeerFailure::kRankOrder, mesh_rank);
      }
    }
  }

  // The same once all have been there; -1 if a rank that has failed has gone on, and has sent those of a later launch.
  __device__ static int id_of_route(const MoeArguments& args, int route) {
    const uint64_t epoch = shared_header().epoch;
    const uint64_t word = ptx::load_relaxed_system(words(epoch) + route);
    return is_there(args, epoch, word) ? id_of_word(word) : -1;
  }
  // Without all ids, nobody knows where a route's token goes.
  __device__ static bool has_ids() { return shared_header().ids_missing == 0; }
  // Whether all tokens have come. Without them, nobody knows whose tokens a unit's rows are: the memory may hold
  // another call's. For consumers that have had a stage.
  __device__ static bool has_tokens() { return shared_header().tokens_missing == 0; }

  __device__ static void start_late(const MoeArguments&) {}
  __device__ static void finish(const MoeArguments&) {}
  __device__ static void inject_delay(const MoeArguments&, DelayPoint) {}

 private:
  // One thread: one rank after the other, and what it compares with loaded anew each time. False: some do not come.
  __device__ __forceinline__ static bool await_tokens_in_turn(const MoeArguments& args) {
    PeerWait wait(args.peers);
    bool came = true;
    int rank = 0;
#pragma unroll 1
    while (came && rank < args.peers.num_ranks) {
      if (ptx::load_acquire_system(own_peer_header()->tokens_sent + rank) >= shared_header().epoch) {
        ++rank;
      } else {
        came = wait.again(PeerFailure::kTokens, rank);
      }
    }
    return came;
  }
  // One thread, until this rank's tokens are sent or a wait has failed.
  __device__ __forceinline__ static void watch_vacant_shares(const MoeArguments& args) {
    VacantShareWatch vacant_shares(args);
    while (ptx::load_acquire_system(own_peer_header()->tokens_sent + args.peers.rank) < shared_header().epoch &&
           !PeerWait::knows_failure()) {
      vacant_shares.check();
    }
  }

  __device__ static uint32_t word_tag(const MoeArguments& args, uint64_t epoch) {
    return static_cast<uint32_t>(epoch) ^ args.peers.call_tag;
  }
  // Of the own routes, each warp has 32 and then others: neighbours in different CTAs.
  __device__ static int first_route_to_send() { return (threadIdx.x / 32 * gridDim.x + blockIdx.x) * 32; }
  __device__ static uint64_t word_of_id(const MoeArguments& args, uint64_t epoch, int id) {
    return static_cast<uint64_t>(word_tag(args, epoch)) << 32 | static_cast<uint32_t>(id);
  }
  __device__ static void store_word(const MoeArguments& args, uint8_t* workspace, uint64_t ids_bytes, uint64_t epoch,
                                    int route, uint64_t word) {
    const size_t place = static_cast<size_t>(args.peers.rank) * args.problem.num_routes() + route;
    ptx::store_relaxed_system(PeerBuffer::ids(workspace, ids_bytes, epoch % 2) + place, word);
  }

  // Once ids are missing: what this rank's next launches send goes nowhere but into its own memory. Nobody waits for it,
  // and another rank's memory may be that of a process which is gone.
  __device__ static void leave_group(const MoeArguments& args) {
    uint64_t* const workspace = args.peers.view->workspace;
#pragma unroll 1
    for (int r = 0; r < args.peers.num_ranks; ++r) {
      workspace[r] = reinterpret_cast<uint64_t>(shared_header().own_workspace);
    }
  }

  __device__ static void send_id(const MoeArguments& args, uint64_t epoch, int route) {
    const SharedHeader& header = shared_header();
    const uint64_t word = word_of_id(args, epoch, __ldg(args.topk_ids + route));
#pragma unroll 1
    for (int r = 0; r < args.peers.num_ranks; ++r) {
      store_word(args, header.workspace[r], header.ids_bytes, epoch, route, word);
    }
  }
};

// Ranks that share one GPU, in tests: the same, with delays of random length, and CTAs that start only when all others
// of their rank have finished.
struct VirtualRanks : PeerRanks {
  __device__ static void inject_delay(const MoeArguments& args, DelayPoint point) {
    if (args.peers.delay_seed == 0) return;
    uint32_t v = args.peers.delay_seed ^ (__ldcg(&args.control->launch) * 2654435761u) ^
                 (args.peers.rank * 97u + blockIdx.x % 4 * 1009u + static_cast<uint32_t>(point)) * 2246822519u;
    v ^= v >> 15, v *= 0x2c1b3c6du, v ^= v >> 12;
    if (v % 4 != 0) return;
    const uint64_t end = ptx::global_nanoseconds() + v / 4 % 20000;
    while (ptx::global_nanoseconds() < end) __nanosleep(200);
  }

  // All threads of a CTA, before it does anything: late CTAs follow each other, from one that the seed chooses.
  __device__ static void start_late(const MoeArguments& args) {
    const uint32_t ctas = gridDim.x, late = args.peers.late_ctas, first = args.peers.delay_seed * 2u % ctas;
    if ((blockIdx.x + ctas - first) % ctas >= late) return;
    const uint32_t target = __ldcg(&args.control->launch) * ctas + ctas - late;
    while (static_cast<int32_t>(ptx::load_acquire(&args.control->finished) - target) < 0) __nanosleep(200);
    __syncthreads();
  }
  // All consumers of a CTA, at the end.
  __device__ static void finish(const MoeArguments& args) {
    ptx::named_barrier_sync(kConsumersBarrier, kConsumerThreads);
    if (threadIdx.x == 0) ptx::add_release(&args.control->finished, 1);
  }
};

}  // namespace megamoe
