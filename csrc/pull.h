// Pull: theta <- theta_0 + alpha (theta - theta_0).
#pragma once

#include "vector.h"

namespace robustft {
namespace {

// With alpha = 0 it returns the anchor, wherever the param is. With alpha = 1 it returns the param. A: one alpha, or
// one for each element.
template <class T, class A>
ROBUSTFT_INLINE Vec<T> pulled(A alpha, Vec<T> param, Vec<T> anchor) {
  const Vec<T> between = anchor + alpha * (param - anchor);
  return alpha == 0 ? anchor : alpha == 1 ? param : between;
}

}  // namespace
}  // namespace robustft
