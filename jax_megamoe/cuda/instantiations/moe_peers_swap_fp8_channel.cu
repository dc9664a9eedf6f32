#define MEGAMOE_WAITS_FOR_RANKS  // common/bounded_wait.cuh says why
#include "instantiations/launchers.cuh"

template struct megamoe::Launcher<megamoe::SwapAb<megamoe::Fp8Channel>, megamoe::PeerRanks>;
