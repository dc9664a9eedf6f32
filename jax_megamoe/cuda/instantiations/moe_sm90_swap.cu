#include "instantiations/orientation_launcher.cuh"

template struct megamoe::OrientationLauncher<true>;
