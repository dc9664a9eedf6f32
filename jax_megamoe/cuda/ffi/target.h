// How a handler file tells the Python module what to register with XLA.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace megamoe {

namespace ffi = xla::ffi;

// One FFI target. `jax_megamoe/primitives/_library.py` has the names too.
struct Target {
  const char* name;
  std::vector<std::pair<const char*, XLA_FFI_Handler*>> stages;
  // Of what a call site keeps between its executions, where it keeps anything.
  const char* type_name = nullptr;
  void* type_id = nullptr;
  void* type_info = nullptr;
};

// What a call site keeps: `class State : public InstanceState<State>`, made by the stage `instantiate`.
template <typename State>
class InstanceState {
 public:
  inline static ffi::TypeId id = {};
  inline static ffi::TypeInfo info = ffi::MakeTypeInfo<State>();

  static ffi::ErrorOr<std::unique_ptr<State>> instantiate() { return std::make_unique<State>(); }
};

// A target whose call sites keep a `State`.
template <typename State>
Target target_with_state(const char* name, const char* type_name,
                         std::vector<std::pair<const char*, XLA_FFI_Handler*>> stages) {
  XLA_FFI_DEFINE_HANDLER(instantiate, State::instantiate, ffi::Ffi::BindInstantiate());
  stages.insert(stages.begin(), {"instantiate", instantiate});
  return {name, std::move(stages), type_name, &State::id, &State::info};
}

}  // namespace megamoe
