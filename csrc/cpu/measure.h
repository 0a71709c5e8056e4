// Measure: the sums over a segment that a rule decides from.
#pragma once

#include <limits>
#include <type_traits>

#include "../chunk.h"

namespace robustft {

// The size of a segment is |.|^2 where it is a tensor, and the sum of magnitudes where it is a row.
struct Measures {
  double grad_dot_delta = 0;  // <g, d>
  double before = 0;          // the size of d
  double gain = 0;            // the size of c less that of d, without the cancellation
};

enum class Measuring : uint8_t { none, squares, magnitudes };

namespace {

inline void add(Measures& to, const Measures& from) {
  to.grad_dot_delta += from.grad_dot_delta;
  to.before += from.before;
  to.gain += from.gain;
}

// kLanes accumulators, spelled as vectors: as an array the compiler would keep them in memory, and every addition
// would wait for the store before it.
template <class T>
struct Lanes {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vec __attribute__((vector_size(32)));
  typedef Bits BitVec __attribute__((vector_size(32)));
  static constexpr int kWidth = 32 / sizeof(T), kCount = kLanes / kWidth;

  Vec value[kCount] = {};

  static ROBUSTFT_INLINE Vec at(const T* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  double fold() const {
    double sum = 0;
    for (int k = 0; k < kCount; ++k)
      for (int l = 0; l < kWidth; ++l) sum += double(value[k][l]);
    return sum;
  }
};

// The sums of one block in T, folded into double at its end.
template <class T, Measuring kMeasuring>
class BlockMeasure {
 public:
  // An absent grad gives a sum that means nothing.
  ROBUSTFT_INLINE void add(int n, const T* param, const T* next, const T* grad, const T* anchor) {
    if (!grad) grad = param;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) add_lanes(param + i, next + i, grad + i, anchor ? anchor + i : nullptr);
    if (const int rest = n - i) {
      T tail[4][kLanes] = {};  // zeros add nothing
      std::memcpy(tail[0], param + i, rest * sizeof(T));
      std::memcpy(tail[1], next + i, rest * sizeof(T));
      std::memcpy(tail[2], grad + i, rest * sizeof(T));
      if (anchor) std::memcpy(tail[3], anchor + i, rest * sizeof(T));
      add_lanes(tail[0], next == param ? tail[0] : tail[1], tail[2], tail[3]);
    }
  }

  // `sign` turns g into the gradient of what the step minimizes.
  Measures fold(double sign) const { return {sign * grad_dot_delta_.fold(), before_.fold(), gain_.fold()}; }

 private:
  using L = Lanes<T>;
  using Vec = typename L::Vec;
  L grad_dot_delta_, before_, gain_;

  static constexpr typename L::Bits kSign = std::numeric_limits<typename L::Bits>::min();
  static ROBUSTFT_INLINE Vec magnitude(Vec x) { return Vec(typename L::BitVec(x) & ~kSign); }
  static ROBUSTFT_INLINE Vec flipped(Vec x, Vec sign) {
    return Vec(typename L::BitVec(x) ^ (typename L::BitVec(sign) & kSign));
  }

  ROBUSTFT_INLINE void add_lanes(const T* param, const T* next, const T* grad, const T* anchor) {
    for (int k = 0; k < L::kCount; ++k) {
      const int i = k * L::kWidth;
      const Vec theta = L::at(param + i), d = anchor ? theta - L::at(anchor + i) : theta;
      const Vec old = kMeasuring == Measuring::squares ? d * d : magnitude(d);
      grad_dot_delta_.value[k] += L::at(grad + i) * d;
      before_.value[k] += old;
      if (next == param) continue;  // nothing has moved
      const Vec u = L::at(next + i) - theta;
      if constexpr (kMeasuring == Measuring::squares)
        gain_.value[k] += u * (d + d + u);
      else
        gain_.value[k] += magnitude(u) <= old ? flipped(u, d) : magnitude(d + u) - old;
    }
  }
};

// c = theta - theta_0, as a rule keeps it.
template <class T>
ROBUSTFT_INLINE void subtract(int n, const T* param, const T* anchor, T* c) {
  if (anchor) {
#pragma omp simd
    for (int i = 0; i < n; ++i) c[i] = param[i] - anchor[i];
  } else {
    std::memcpy(c, param, n * sizeof(T));
  }
}

template <class T>
class BlockMeasure<T, Measuring::none> {
 public:
  ROBUSTFT_INLINE void add(int, const T*, const T*, const T*, const T*) {}
  Measures fold(double) const { return {}; }
};

}  // namespace
}  // namespace robustft
