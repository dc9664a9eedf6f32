// Addresses of shared memory as PTX takes them (PTX ISA, "cvta").
#pragma once

#include <cstdint>

namespace megamoe::ptx {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace megamoe::ptx
