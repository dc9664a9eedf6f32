// Waits for other ranks, and what ends them all once one is in vain.
#pragma once

#include <cstdint>

#include "common/ptx/clock.cuh"
#include "common/ptx/memory_order.cuh"
#include "kernels/arguments.h"
#include "kernels/shared_header.cuh"
#include "layout/peer_buffer.h"

namespace megamoe {

// The flags that the ranks set for each other, in the buffer of another rank and in the own one.
__device__ __forceinline__ PeerHeader* peer_header(int rank) {
  return PeerBuffer::header(shared_header().workspace[rank]);
}
__device__ __forceinline__ PeerHeader* own_peer_header() { return PeerBuffer::header(shared_header().own_workspace); }

// Bounded waiting in a group: until it has come, or the time is over, or another rank's time is. After a failure every
// wait ends, whatever it waited for: the launch comes to its end, and its results are NaN.
class PeerWait {
 public:
  __device__ explicit PeerWait(const Peers& peers) : peers_(peers) {}

  // Whether to look again. Own work may have to wait for other ranks first, several times: these are named, and not
  // this one.
  __device__ bool again(PeerFailure::Phase phase, int peer) {
    if (seen() != 0) return false;
    if ((++spins_ & 0x3ff) != 0) return true;  // reading word and timer on every spin would slow the wait itself
    if (has_failed(peers_)) return false;
    const uint64_t now = ptx::global_nanoseconds();
    if (start_ == 0) start_ = now;
    constexpr int kOwnLimits = 4;
    const bool own = peer == peers_.rank;
    if (now - start_ <= (own ? kOwnLimits : 1) * shared_header().timeout_nanoseconds) return true;
    fail(peers_, own ? PeerFailure::kOwn : phase, peer);
    return false;
  }

  // Whoever notices a failure notes it for the host: also a rank to which another one reported it.
  __device__ static bool has_failed(const Peers& peers) { return is_failure(peers, failure_word()); }

  // Whether a warp of this CTA has noticed one.
  __device__ static bool knows_failure() { return seen() != 0; }

  // The same in two parts, for who has something else to do until the word is here.
  __device__ static uint64_t failure_word() { return ptx::load_relaxed_system(&own_peer_header()->failed); }
  __device__ static bool is_failure(const Peers& peers, uint64_t word) {
    if (word == 0) return false;
    seen() = 1;  // ends the CTA's other waits without a thousand tries of each
    if (atomicExch(&own_peer_header()->noted, 1) == 0) *const_cast<volatile uint64_t*>(peers.note) = word;
    return true;
  }

  // The first failure is kept, and reported to the other ranks, which would wait in vain.
  __device__ static void fail(const Peers& peers, PeerFailure::Phase phase, int peer) {
    const uint64_t word = PeerFailure{phase, peers.rank, peer, shared_header().epoch}.word();
    auto* failed = reinterpret_cast<unsigned long long*>(&own_peer_header()->failed);
    if (atomicCAS(failed, 0, word) == 0) {
#pragma unroll 1
      for (int r = 0; r < peers.num_ranks; ++r) {
        if (r != peers.rank) ptx::store_relaxed_system(&peer_header(r)->failed, word);
      }
    }
    has_failed(peers);
  }

 private:
  // Whether a warp of this CTA knows of a failure.
  __device__ static volatile uint32_t& seen() { return shared_header().group_failed; }

  const Peers& peers_;
  uint32_t spins_ = 0;
  uint64_t start_ = 0;
};

}  // namespace megamoe
