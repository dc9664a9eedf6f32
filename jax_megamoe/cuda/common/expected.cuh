// A hint where the compiler should place rare code.
#pragma once

namespace megamoe {

// `condition`, which nearly always holds. The code for the other case should not lie in between: a launch finds little
// of its code in the SM's instruction cache.
__device__ __forceinline__ bool expected(bool condition) { return __builtin_expect(condition, true); }

}  // namespace megamoe
