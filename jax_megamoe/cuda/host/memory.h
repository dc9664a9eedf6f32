// What follows from a device's memory bandwidth.
#pragma once

namespace megamoe {

// Bytes of weights that each SM of the current device should have on their way. Asks the driver once for each device; cheap
// afterwards.
int weight_bytes_in_flight();

// Up to so many (token, slot) pairs per expert the normal orientation waits for its weights more than it multiplies. Likewise.
int most_pairs_per_expert_waiting();

}  // namespace megamoe
