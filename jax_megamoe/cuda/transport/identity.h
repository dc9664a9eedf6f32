// Which host and which process this is, and random names.
#pragma once

#include <cstdint>
#include <string>

namespace megamoe::transport {

// The same for all processes on one running kernel, in whatever containers: its boot id, and where that can't be read,
// the host's name.
std::string host_identity();

struct Identity {
  uint64_t host[2];     // of `host_identity`
  uint64_t process[2];  // random, one per process: pids repeat between containers
};

Identity identify();

// Random, never zero.
uint64_t draw_token();

}  // namespace megamoe::transport
