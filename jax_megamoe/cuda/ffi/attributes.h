// Attributes of an FFI call, where a handler takes the dictionary.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace megamoe {

// Sets each field to the int64 attribute of its name; returns a sentence that names the first one that the call lacks.
inline std::string read_integers(const xla::ffi::Dictionary& attributes,
                                 std::initializer_list<std::pair<const char*, int64_t*>> fields) {
  for (const auto& [name, field] : fields) {
    const auto value = attributes.get<int64_t>(name);
    if (value.has_error()) return std::string("the call lacks the attribute ") + name + ".";
    *field = value.value();
  }
  return {};
}

}  // namespace megamoe
