#include "host/memory.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "host/per_device.h"
#include "kernels/roles.h"

namespace megamoe {

namespace {

// Zero: the driver does not say.
double bytes_per_microsecond_and_sm(int device) {
  int kilohertz = 0, bits = 0, sms = 0;
  if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || sms == 0) {
    return 0.0;
  }
  constexpr int kTransfersPerClock = 2;  // spec: HBM has a double data rate
  return kTransfersPerClock * (kilohertz * 1e-3) * (bits / 8) / sms;
}

int bytes_in_flight(int device) {
  constexpr double kMicrosecondsInFlight = 2.0;  // measured (docs/performance-log.md)
  const double wanted = kMicrosecondsInFlight * bytes_per_microsecond_and_sm(device);
  return std::max(kWeightBytesInFlight, static_cast<int>(wanted));
}

constexpr int kMostPairsWaiting = 112;

int pairs_waiting(int device) {
  constexpr double kPairsTimesRate = 2850.0;  // measured: 112 pairs on an H100 (docs/performance-log.md)
  const double rate = bytes_per_microsecond_and_sm(device) * 1e-3;
  return rate > 0.0 ? std::min(kMostPairsWaiting, static_cast<int>(kPairsTimesRate / rate)) : kMostPairsWaiting;
}

}  // namespace

int weight_bytes_in_flight() {
  static PerDevice known;
  return known.get(bytes_in_flight, kWeightBytesInFlight);
}

int most_pairs_per_expert_waiting() {
  static PerDevice known;
  return known.get(pairs_waiting, kMostPairsWaiting);
}

}  // namespace megamoe
