#define MEGAMOE_WAITS_FOR_RANKS  // kernels/waiting.cuh says why
#define MEGAMOE_OUTLINE_TRAPS    // common/ptx.cuh says why
#include "instantiations/launchers.cuh"

template struct megamoe::VirtualRanksLauncher<megamoe::Normal>;
