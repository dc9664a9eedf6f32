// The expert group: how ranks find each other's memory, tell each other what is done, and wait for it.
// OneRank has all experts; PeerRanks are GPUs that see each other's memory. The protocol is in docs/expert-parallel.md.
#pragma once

#include <cstdint>

#include "common/system_flags.cuh"
#include "kernels/arguments.h"
#include "kernels/shared_header.cuh"

namespace megamoe {

// Bounded waiting in a group: until it has come, or the time is over, or somebody's time is. After a failure, every wait ends,
// whatever it waited for: the launch comes to its end, with results that say so.
class PeerWait {
 public:
  __device__ explicit PeerWait(const Peers& peers) : peers_(peers) {}

  // Whether to look again. `limits`: how many times the limit this wait may take.
  __device__ bool again(PeerFailure::Phase phase, int peer, int limits = 1) {
    if ((++spins_ & 0x3ff) != 0) return true;  // reading the timer on every spin would slow the wait itself
    if (has_failed(peers_)) return false;
    const uint64_t now = ptx::global_nanoseconds();
    if (start_ == 0) start_ = now;
    if (now - start_ <= limits * peers_.limit_nanoseconds) return true;
    fail(phase, peer);
    return false;
  }

  __device__ static bool has_failed(const Peers& peers) { return ptx::load_relaxed(&peers.header->failed) != 0; }

 private:
  // The first one leaves word for the host, and tells the other ranks, which would wait in vain.
  __device__ void fail(PeerFailure::Phase phase, int peer) {
    if (atomicExch(&peers_.header->failed, 1) != 0) return;
    PeerFailure* failure = peers_.failure;
    failure->peer = peer;
    failure->epoch = shared_header().epoch;
    __threadfence_system();
    *const_cast<volatile uint32_t*>(&failure->phase) = phase;
    for (int r = 0; r < peers_.num_ranks; ++r) {
      PeerHeader* there = reinterpret_cast<PeerHeader*>(reinterpret_cast<char*>(peers_.header) + peers_.offset[r]);
      *const_cast<volatile uint32_t*>(&there->failed) = 1;
    }
  }

  const Peers& peers_;
  uint32_t spins_ = 0;
  uint64_t start_ = 0;
};

// All experts on one device.
struct OneRank {
  static constexpr bool kHasPeers = false;

  __device__ static int num_ranks(const MoeArguments&) { return 1; }
  __device__ static int rank(const MoeArguments&) { return 0; }
  __device__ static int rank_of_expert(const MoeArguments&, int) { return 0; }
  __device__ static uint16_t* slot_row(const MoeArguments& args, int pair) {
    return args.workspace.slot_outputs + static_cast<size_t>(pair) * args.problem.hidden_size;
  }
  __device__ static int pair_of_group(const MoeArguments&, int pair) { return pair; }
  template <typename T>
  __device__ static T* on(const MoeArguments&, int, T* pointer) {
    return pointer;
  }
  __device__ static void dawdle(const MoeArguments&, int) {}
  __device__ static void wait_local(const MoeArguments&, const uint32_t* counter, uint32_t target) {
    ptx::wait_until_at_least(counter, target);
  }
};

struct PeerRanks {
  static constexpr bool kHasPeers = true;

  __device__ static int num_ranks(const MoeArguments& args) { return args.peers.num_ranks; }
  __device__ static int rank(const MoeArguments& args) { return args.peers.rank; }
  __device__ static int rank_of_expert(const MoeArguments& args, int expert) {
    return expert / args.problem.num_experts;
  }

  // The same place in another rank's buffer.
  template <typename T>
  __device__ static T* on(const MoeArguments& args, int rank, T* own) {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(own) + args.peers.offset[rank]);
  }

  __device__ static int pair_of_group(const MoeArguments& args, int pair) {
    return args.peers.rank << kPairRankShift | pair;
  }
  // Where the result of a pair goes: to the rank whose token it is.
  __device__ static uint16_t* slot_row(const MoeArguments& args, int pair) {
    const size_t own = pair & ((1 << kPairRankShift) - 1);
    return on(args, pair >> kPairRankShift, args.workspace.slot_outputs) + own * args.problem.hidden_size;
  }

  // Work of this rank, which may have to wait for others first.
  __device__ static void wait_local(const MoeArguments& args, const uint32_t* counter, uint32_t target) {
    PeerWait wait(args.peers);
    while (ptx::load_acquire(counter) < target && wait.again(PeerFailure::kOwn, args.peers.rank, 3)) {
    }
  }

  // One warp: waits for flags [rows][kMaxRanks], of the ranks that there are. Returns whether they came.
  __device__ static bool wait_for_ranks(const MoeArguments& args, const uint64_t* flags, int rows, uint64_t epoch,
                                        PeerFailure::Phase phase) {
    const int num_ranks = args.peers.num_ranks;
    bool came = true;
    for (int i = threadIdx.x % 32; i < rows * num_ranks; i += 32) {
      const int row = i / num_ranks, rank = i - row * num_ranks;
      PeerWait wait(args.peers);
      while (ptx::load_acquire_system(flags + row * kMaxRanks + rank) < epoch && came) came = wait.again(phase, rank);
    }
    came = __all_sync(~0u, came);
    __syncwarp();  // a vote orders no memory: what one lane has observed, the others may read now
    return came;
  }

  // One thread, which has observed what the flag announces: sets `flag` in the header of every rank. A rank that has failed
  // announces nothing, since its data are of no use.
  __device__ static void announce(const MoeArguments& args, uint64_t* flag, uint64_t epoch) {
    if (PeerWait::has_failed(args.peers)) return;
    __threadfence_system();
    for (int r = 0; r < args.peers.num_ranks; ++r) ptx::store_relaxed_system(on(args, r, flag), epoch);
  }

  // Sends every rank the own ids, a word for each, which holds its epoch too: no flag, no fence. All threads of all CTAs.
  __device__ static void send_ids(const MoeArguments& args, uint64_t epoch) {
    const int own = args.problem.num_pairs();
    const int words = args.problem.group_pairs();
    const uint64_t tag = word_tag(args, epoch);
    uint64_t* inbox = args.peers.ids[epoch % 2] + static_cast<size_t>(args.peers.rank) * own;
    for (int i = blockIdx.x * kCtaThreads + threadIdx.x; i < words; i += gridDim.x * kCtaThreads) {
      const int rank = i / own, pair = i - rank * own;
      const uint64_t id = static_cast<uint32_t>(__ldg(args.topk_ids + pair));
      ptx::store_relaxed_system(on(args, rank, inbox) + pair, tag << 32 | id);
    }
  }

  // The id that a word holds as soon as it is there; -1 if it does not come. `pair` is counted over the group.
  __device__ static int received_id(const MoeArguments& args, uint64_t epoch, int pair, uint64_t word) {
    const uint32_t tag = word_tag(args, epoch);
    if (word >> 32 != tag) {
      PeerWait wait(args.peers);
      do {
        if (!wait.again(PeerFailure::kIds, pair / args.problem.num_pairs())) {
          shared_header().ids_missing = 1;
          return -1;
        }
        word = ptx::load_relaxed_system(args.peers.ids[epoch % 2] + pair);
      } while (word >> 32 != tag);
    }
    return static_cast<int>(static_cast<uint32_t>(word));
  }

  // Called at the points of the protocol where a rank may be slow.
  __device__ static void dawdle(const MoeArguments&, int) {}

 private:
  __device__ static uint32_t word_tag(const MoeArguments& args, uint64_t epoch) {
    return static_cast<uint32_t>(epoch) ^ args.peers.shape_tag;
  }
};

// Ranks that share one GPU, in tests: the same, with pauses of random length to shuffle the order of events.
struct VirtualRanks : PeerRanks {
  __device__ static void dawdle(const MoeArguments& args, int point) {
    if (args.peers.delay_seed == 0) return;
    const uint64_t epoch = args.peers.header->epoch;
    uint32_t v = args.peers.delay_seed ^ (static_cast<uint32_t>(epoch) * 2654435761u) ^
                 (args.peers.rank * 97u + blockIdx.x % 4 * 1009u + point) * 2246822519u;
    v ^= v >> 15, v *= 0x2c1b3c6du, v ^= v >> 12;
    if (v % 4 != 0) return;
    const uint64_t end = ptx::global_nanoseconds() + v / 4 % 20000;
    while (ptx::global_nanoseconds() < end) __nanosleep(200);
  }
};

}  // namespace megamoe
