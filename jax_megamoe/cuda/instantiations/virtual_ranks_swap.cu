#include "instantiations/launchers.cuh"

template struct megamoe::VirtualRanksLauncher<true>;
