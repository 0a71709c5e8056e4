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

// The sums of one block in T, in kLanes accumulators each, folded into double at its end.
template <class T, Measuring kMeasuring>
class BlockMeasure {
 public:
  // Numbers that belong to the k-th register of accumulators; d = param - anchor.
  ROBUSTFT_INLINE void add(int k, Vec<T> param, Vec<T> next, Vec<T> grad, Vec<T> d) {
    const Vec<T> u = next - param, old = kMeasuring == Measuring::squares ? d * d : magnitude(d);
    grad_dot_delta_[k] += grad * d;
    before_[k] += old;
    if constexpr (kMeasuring == Measuring::squares)
      gain_[k] += u * (d + d + u);
    else
      gain_[k] += magnitude(u) <= old ? flipped(u, d) : magnitude(d + u) - old;
  }

  // `sign` turns g into the gradient of what the step minimizes. used: accumulators that are not 0.
  Measures fold(double sign, int used = kLanes) const {
    return {sign * sum(grad_dot_delta_, used), sum(before_, used), sum(gain_, used)};
  }

 private:
  using Lanes = Vec<T>[kLanes / kWidth<T>];
  Lanes grad_dot_delta_ = {}, before_ = {}, gain_ = {};

  static constexpr Integer<T> kSign = std::numeric_limits<Integer<T>>::min();
  static ROBUSTFT_INLINE Vec<T> magnitude(Vec<T> x) { return bit_cast<Vec<T>>(bit_cast<Vec<Integer<T>>>(x) & ~kSign); }
  static ROBUSTFT_INLINE Vec<T> flipped(Vec<T> x, Vec<T> sign) {
    return bit_cast<Vec<T>>(bit_cast<Vec<Integer<T>>>(x) ^ (bit_cast<Vec<Integer<T>>>(sign) & kSign));
  }
  static double sum(const Lanes& lanes, int used) {
    double sum = 0;
    for (int l = 0; l < used; ++l) sum += double(lanes[l / kWidth<T>][l % kWidth<T>]);
    return sum;
  }
};

template <class T>
class BlockMeasure<T, Measuring::none> {
 public:
  ROBUSTFT_INLINE void add(int, Vec<T>, Vec<T>, Vec<T>, Vec<T>) {}
  Measures fold(double, int = 0) const { return {}; }
};

}  // namespace
}  // namespace robustft
