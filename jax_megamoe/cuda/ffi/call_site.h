// What one call site of the layer keeps per device: the counters that its launches share.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

#include "host/launch.h"
#include "xla/ffi/api/ffi.h"

namespace megamoe {

namespace ffi = xla::ffi;

// Calls of one call site on one device run in order, so that nobody else writes its counters.
class CallSite {
 public:
  struct Device {
    int device = 0;  // the CUDA runtime's number
    Control* control = nullptr;
    size_t control_bytes = 0;
    int counter_words = 0;
    int num_ctas = 0;
  };

  ~CallSite();

  // `ordinal` names it, `device` is the CUDA runtime's number; `problem` is that of the call's largest launch;
  // `prepare` loads the kernels that it launches.
  ffi::Error initialize(int ordinal, int device, const Problem& problem, cudaError_t (*prepare)(WeightFormat));

  // Null before `initialize`.
  const Device* find(int ordinal) const;

 private:
  mutable std::mutex mutex_;
  std::map<int, Device> devices_;  // by ordinal
};

}  // namespace megamoe
