#define MEGAMOE_WAITS_FOR_RANKS  // kernels/waiting.cuh says why
#include "instantiations/launchers.cuh"

template struct megamoe::VirtualRanksLauncher<megamoe::SwapAb>;
