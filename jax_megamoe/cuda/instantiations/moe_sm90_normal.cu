#define MEGAMOE_OUTLINE_TRAPS  // common/ptx.cuh says why
#include "instantiations/launchers.cuh"

template struct megamoe::Launcher<megamoe::Normal, megamoe::OneRank>;
