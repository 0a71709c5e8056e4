// Pull: theta <- theta_0 + alpha (theta - theta_0), or a part of it for some elements.
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

// theta~ - hold d where the step from param to next leads toward the anchor or nowhere, else theta~. d = param - anchor.
template <class T>
ROBUSTFT_INLINE Vec<T> held(T hold, Vec<T> param, Vec<T> next, Vec<T> anchor) {
  const Vec<T> d = param - anchor, less = next - hold * d;
  return (param - next) * d >= 0 ? less : next;
}

// What is known of the pull before the sweep: alpha, or if the pull is cautious 1 and what it holds.
template <class T>
struct Known {
  T alpha = 1, hold = 0;

  ROBUSTFT_ANYWHERE static Known of(double alpha, bool cautious) {
    return cautious ? Known{1, T(1 - alpha)} : Known{T(alpha), 0};
  }
  ROBUSTFT_ANYWHERE bool leaves_alone() const { return alpha == 1 && hold == 0; }
};

}  // namespace
}  // namespace robustft
