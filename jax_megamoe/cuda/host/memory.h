// What follows from a device's memory bandwidth.
#pragma once

namespace megamoe {

// Bytes of weights that each SM of the current device should have on their way. Asks the driver once for each device; cheap
// afterwards.
int weight_bytes_in_flight();

// Up to so many (token, slot) pairs per expert the memory takes so long for a unit's weights that tokens are gathered by row meanwhile
// (kernels/row_gather.cuh). Likewise.
int most_pairs_per_expert_of_rows();

}  // namespace megamoe
