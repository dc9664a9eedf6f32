// The weights as C++ knows them: for each line "H I" and format the format, its layout and the leaves, a line each, and an
// empty line.
#include <iostream>

#include "layout/weights.h"

namespace {

const char* name_of_type(megamoe::Element element) {
  switch (element) {
    case megamoe::Element::kF32:
      return "float32";
    case megamoe::Element::kU8:
      return "uint8";
    default:
      return "float8_e4m3fn";
  }
}

}  // namespace

int main() {
  for (int hidden, inter; std::cin >> hidden >> inter;) {
    for (const megamoe::WeightFormatNames& known : megamoe::kWeightFormats) {
      std::cout << known.name << ' ' << known.layout << '\n';
      for (const megamoe::WeightLeaf& leaf : megamoe::weight_leaves(known.format, hidden, inter)) {
        std::cout << leaf.name << ' ' << name_of_type(leaf.element);
        for (int64_t dim : leaf.dims) std::cout << ' ' << dim;
        std::cout << ' ' << leaf.expert_bytes() << '\n';
      }
      std::cout << '\n';
    }
  }
}
