// The benchmark's yardstick: how fast this device can stream bytes into shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace megamoe {

// Reads `bytes` (rounded up to 32 KiB) from a buffer of `total` bytes, beginning at `start` and wrapping around its
// end. `sink` keeps the compiler from dropping the reads.
cudaError_t launch_read_ceiling(const uint8_t* buffer, size_t total, size_t start, size_t bytes, uint32_t* sink,
                                int ctas, cudaStream_t stream);

}  // namespace megamoe
