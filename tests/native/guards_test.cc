// The guard bands of bench/native over a fake runtime, where memory is the host's. In: "SIDE OFFSET COUNT" each line, a
// buffer of which so many bytes from there on are written, before its begin, inside it, or behind its end. Out: what
// the guards report, or "whole".
#include "guards.h"

#include <cstring>
#include <iostream>

int main() {
  constexpr size_t kBytes = 1001;
  std::string side;
  for (long long offset, count; std::cin >> side >> offset >> count;) {
    probe::Guards guards;
    char* const other = static_cast<char*>(guards.allocate("x", 4096));
    char* const buffer = static_cast<char*>(guards.allocate("y", kBytes));
    std::memset(buffer, 0xff, kBytes);
    std::memset(other, 0, 4096);
    std::memset(buffer + (side == "behind" ? kBytes : 0) + offset, 0, count);
    const std::string damage = guards.damage();
    std::cout << (damage.empty() ? "whole\n" : damage);
    if (!guards.release(buffer) || !guards.release(other) || guards.release(buffer)) std::cout << "not released\n";
    if (!guards.damage().empty()) std::cout << "what was released is looked at\n";
  }
}
