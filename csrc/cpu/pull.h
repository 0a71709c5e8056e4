// Pull: theta <- theta_0 + alpha (theta - theta_0).
#pragma once

#include "../chunk.h"

namespace robustft {
namespace {

template <class T>
ROBUSTFT_INLINE void pull(int n, T alpha, T* param, const T* anchor) {
  if (alpha == 0) {  // onto the anchor, from wherever it is
    if (anchor)
      std::memcpy(param, anchor, n * sizeof(T));
    else
      std::memset(param, 0, n * sizeof(T));
  } else if (anchor) {
#pragma omp simd
    for (int i = 0; i < n; ++i) param[i] = anchor[i] + alpha * (param[i] - anchor[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) param[i] = alpha * param[i];
  }
}

}  // namespace
}  // namespace robustft
