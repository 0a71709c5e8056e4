// Pull: theta <- theta_0 + alpha (theta - theta_0).
#pragma once

#include "../vector.h"

namespace robustft {
namespace {

// With alpha = 0 onto the anchor, from wherever it is; with alpha = 1 nowhere. A: one alpha, or one for each.
template <class T, class A>
ROBUSTFT_INLINE Vec<T> pulled(A alpha, Vec<T> param, Vec<T> anchor) {
  const Vec<T> between = anchor + alpha * (param - anchor);
  return alpha == 0 ? anchor : alpha == 1 ? param : between;
}

}  // namespace
}  // namespace robustft
