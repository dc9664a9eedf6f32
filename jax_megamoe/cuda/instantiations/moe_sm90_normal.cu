#include "instantiations/launchers.cuh"

template struct megamoe::Launcher<false, megamoe::OneRank>;
