// Pull: theta <- theta_0 + alpha (theta - theta_0).
#pragma once

#include "../vector.h"

namespace robustft {
namespace {

// With alpha = 0 onto the anchor, from wherever it is.
template <class T>
ROBUSTFT_INLINE Vec<T> pulled(T alpha, Vec<T> param, Vec<T> anchor) {
  return alpha == 0 ? anchor : anchor + alpha * (param - anchor);
}

}  // namespace
}  // namespace robustft
