// What the fused kernel accepts. Needs no CUDA: the module has it in CPU-only builds too.
#pragma once

#include <string>

#include "layout/workspace.h"

namespace megamoe {

// Empty if the kernel serves the problem, else one sentence saying what it does not serve.
std::string unsupported_reason(const Problem& problem);

// Scratch of a call, shared and local, is kept under this by launching for some of the tokens at a time.
constexpr size_t kMaxScratchBytes = 4'000'000'000;

// The problem of the largest launch of a call: what scratch and counters are sized for.
Problem per_launch(const Problem& problem);

}  // namespace megamoe
