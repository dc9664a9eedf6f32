// What the Python module registers with XLA, one function for each handler file.
#pragma once

#include <cstdint>

#include "ffi/target.h"

namespace megamoe {

Target moe_target();
Target moe_peers_target();
Target route_target();
Target wire_test_target();

// How often the execute handler of one device ran in this process: a replayed command buffer does not call it.
int64_t moe_execute_count();

}  // namespace megamoe
