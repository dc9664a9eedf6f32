// The weights as C++ knows them: format and layout, then for each line "H I" the leaves, a line each, and an empty
// line.
#include <iostream>

#include "layout/weights.h"

int main() {
  std::cout << megamoe::kWeightFormat << ' ' << megamoe::kWeightLayout << "\n\n";
  for (int hidden, inter; std::cin >> hidden >> inter;) {
    for (const megamoe::WeightLeaf& leaf : megamoe::weight_leaves(hidden, inter)) {
      std::cout << leaf.name << ' ' << (leaf.element == megamoe::Element::kF32 ? "float32" : "float8_e4m3fn");
      for (int64_t dim : leaf.dims) std::cout << ' ' << dim;
      std::cout << ' ' << leaf.expert_bytes() << '\n';
    }
    std::cout << '\n';
  }
}
