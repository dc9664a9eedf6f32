#include "transport/identity.h"

#include <unistd.h>

#include <fstream>
#include <random>

namespace megamoe::transport {

namespace {

void hash(const std::string& text, uint64_t result[2]) {
  uint64_t first = 0xcbf29ce484222325ull, second = 0x84222325cbf29ce4ull;  // FNV-1a, from two starting values
  for (const unsigned char c : text) {
    first = (first ^ c) * 0x100000001b3ull;
    second = (second ^ c) * 0x100000001b3ull;
  }
  result[0] = first;
  result[1] = second;
}

}  // namespace

std::string host_identity() {
  std::string boot;
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  if (std::getline(file, boot) && !boot.empty()) return boot;
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "";
}

Identity identify() {
  struct Process {
    uint64_t words[2] = {draw_token(), draw_token()};
  };
  static const Process process;
  Identity identity = {};
  hash(host_identity(), identity.host);
  identity.process[0] = process.words[0];
  identity.process[1] = process.words[1];
  return identity;
}

uint64_t draw_token() {
  std::random_device source;
  uint64_t token = 0;
  while (token == 0) token = (static_cast<uint64_t>(source()) << 32) | source();
  return token;
}

}  // namespace megamoe::transport
