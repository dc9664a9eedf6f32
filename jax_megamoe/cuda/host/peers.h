// Host side of the expert group: a rank's view of the shared buffers, and what a failed wait left behind.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/arguments.h"

namespace megamoe {

// Turn the arguments of a call over all tokens, or all experts, of a group into those of one rank, which has the sizes
// in `arguments->problem`. One layer, bf16 results.
void take_tokens_of_rank(MoeArguments* arguments, int rank);
void take_experts_of_rank(MoeArguments* arguments, int rank);

// What a call over a group waits for, and how long.
struct PeerTimeouts {
  uint64_t microseconds;        // of each wait
  uint64_t first_microseconds;  // ... in the first launch of a call site, if that is longer
};

// Sets `peers` and the shared part of the workspace of one rank, as places in it. `part` is the problem of the largest
// launch, `view` in the memory of the rank's device, `note` in memory that the host sees, too. `call_id` is the same on
// all ranks for the same call, and for no other one that might take its place.
void join_peers(MoeArguments* arguments, const Problem& part, int rank, PeerView* view, uint64_t* note,
                const PeerTimeouts& timeouts, uint32_t call_id);

// A sentence that says of a PeerFailure what rank `rank` has to do with it; nothing for zero.
std::string failure_text(uint64_t failure, int rank);

}  // namespace megamoe
