#include "instantiations/launchers.cuh"

template struct megamoe::Launcher<true, megamoe::PeerRanks>;
