// Host side of the expert group: a rank's view of the shared buffers, and what a failed wait left behind.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/arguments.h"

namespace megamoe {

// Turn the arguments of a call over all tokens, or all experts, of a group into those of one rank, which has the sizes in
// `arguments->problem`. One layer, bf16 results.
void take_tokens_of_rank(MoeArguments* arguments, int rank);
void take_experts_of_rank(MoeArguments* arguments, int rank);

// Sets `peers` and the shared part of the workspace of one rank. `mapped[r]` is rank r's buffer of `bytes` as this rank's device
// sees it, `part` the problem of the largest launch. False if that does not fit into the buffer.
bool join_peers(MoeArguments* arguments, const Problem& part, int rank, void* const* mapped, size_t bytes,
                PeerFailure* failure, uint64_t limit_microseconds);

// Empty as long as no wait of the rank has failed, else a sentence that names rank, phase and epoch.
std::string failure_text(const PeerFailure& failure, int rank);

}  // namespace megamoe
