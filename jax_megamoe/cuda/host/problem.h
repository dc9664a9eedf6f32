// What the fused kernel accepts. Needs no CUDA: the module has it in CPU-only builds too.
#pragma once

#include <string>

#include "layout/workspace.h"

namespace megamoe {

// Empty if the kernel serves the problem, else one sentence saying what it does not serve.
std::string unsupported_reason(const Problem& problem);

}  // namespace megamoe
