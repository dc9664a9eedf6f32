// Peers' pointers of a window, where NCCL tells them to device code only (2.28).
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "transport/nccl_api.h"

namespace megamoe::transport {

// Whether this build holds the kernel, compiled with NCCL's device headers, and the loaded version lays windows out as
// those headers do. MEGAMOE_NCCL_INCLUDE of CMakeLists.txt names the headers.
bool can_read_window_table(int nccl_version);

// Fills the table, whose size is the number of ranks.
std::string read_window_table(Window window, cudaStream_t stream, std::vector<void*>* peers);

}  // namespace megamoe::transport
