// A kernel of somebody else's that keeps SMs for a while, for tests of what goes on beside it.
#pragma once

#include <cuda_runtime_api.h>

namespace megamoe {

// Enqueues `ctas` CTAs on a stream of their own on the current device, each of which has an SM to itself for so long.
// Returns when all of them have begun, or would be over.
cudaError_t hold_sms(int ctas, int milliseconds);

}  // namespace megamoe
