#define MEGAMOE_OUTLINE_TRAPS  // common/bounded_wait.cuh says why
#include "instantiations/launchers.cuh"

template struct megamoe::Launcher<megamoe::Normal<megamoe::Mxfp4>, megamoe::OneRank>;
