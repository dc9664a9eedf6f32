// Registers that warpgroups pass on to each other (PTX ISA, "setmaxnreg").
#pragma once

#include <cstdint>

namespace megamoe::ptx {

template <uint32_t kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <uint32_t kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace megamoe::ptx
