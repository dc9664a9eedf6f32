// Launches of the handlers' tests: they look whether each buffer holds what the kernel touches.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace fakes {

// Nothing reads or writes buffers from here on, which is where no memory is: addresses far apart, each with its bytes.
constexpr uint64_t kNowhere = uint64_t{1} << 56;
inline std::map<uint64_t, __uint128_t> bytes_at;

inline bool launched;
inline std::string overrun;  // names of what a launch touches beyond its buffer

// Of a group, as XLA hands it over.
struct Communicator {
  int num_ranks = 0;
};

inline void forget() {
  bytes_at.clear();
  overrun.clear();
  launched = false;
}

}  // namespace fakes
