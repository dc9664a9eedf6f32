#define MEGAMOE_OUTLINE_TRAPS  // common/ptx.cuh says why
#include "instantiations/orientation_launcher.cuh"

template struct megamoe::OrientationLauncher<false>;
