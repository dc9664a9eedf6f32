// How much of a device's memory bandwidth an SM has to keep busy.
#pragma once

namespace megamoe {

// Bytes of weights that each SM of the current device should have on their way. Asks the driver once for each device; cheap
// afterwards.
int weight_bytes_in_flight();

}  // namespace megamoe
