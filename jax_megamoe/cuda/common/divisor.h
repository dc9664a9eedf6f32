// Division by a number that only the host knows beforehand: a multiplication instead of forty instructions.
#pragma once

#include <cstdint>

#include "layout/tiles.h"

namespace megamoe {

class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(uint32_t divisor)
      : divisor_(divisor), reciprocal_(static_cast<uint32_t>(((1ull << 32) + divisor - 1) / divisor)) {}

  __host__ __device__ uint32_t value() const { return divisor_; }

  // Exact for all 32-bit numbers: the reciprocal, rounded up, makes the estimate at most one too large.
  __host__ __device__ uint32_t divide(uint32_t number) const {
    if (divisor_ == 1) return number;  // its reciprocal does not fit
    const uint32_t estimate = static_cast<uint32_t>(static_cast<uint64_t>(number) * reciprocal_ >> 32);
    return estimate - (static_cast<uint64_t>(estimate) * divisor_ > number ? 1 : 0);
  }

 private:
  uint32_t divisor_ = 1;
  uint32_t reciprocal_ = 0;
};

}  // namespace megamoe
