// Divisor against the division of the processor: "divisor number" per line in, the quotient per line out.
#include <cstdint>
#include <iostream>

#include "common/divisor.h"

int main() {
  uint32_t divisor, number;
  while (std::cin >> divisor >> number) std::cout << megamoe::Divisor(divisor).divide(number) << '\n';
}
