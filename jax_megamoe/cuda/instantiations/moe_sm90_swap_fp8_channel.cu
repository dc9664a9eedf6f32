#include "instantiations/launchers.cuh"

template struct megamoe::Launcher<megamoe::SwapAb<megamoe::Fp8Channel>, megamoe::OneRank>;
