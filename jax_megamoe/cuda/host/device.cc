#include "host/device.h"

namespace megamoe {

namespace {

Device ask_driver(int device) {
  Device answer = {};
  cudaDeviceGetAttribute(&answer.num_sms, cudaDevAttrMultiProcessorCount, device);
  int kilohertz = 0, bits = 0;
  if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device) == cudaSuccess) {
    constexpr int kTransfersPerClock = 2;  // spec: HBM has a double data rate
    answer.bytes_per_microsecond = kTransfersPerClock * (kilohertz * 1e-3) * (bits / 8);
  }
  cudaGetLastError();  // an attribute that the driver does not know is no error of the launch that follows
  return answer;
}

}  // namespace

Device current_device(int num_ctas) {
  static PerDevice<Device> known;
  Device device = known.get(ask_driver);
  device.num_ctas = num_ctas;
  return device;
}

}  // namespace megamoe
