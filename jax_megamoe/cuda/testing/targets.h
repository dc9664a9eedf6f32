// What tests and benchmarks call and users do not: compiled with MEGAMOE_TESTING only (docs/building.md).
#pragma once

#include "ffi/target.h"

namespace megamoe {

Target virtual_ranks_target();
Target read_ceiling_target();

}  // namespace megamoe
