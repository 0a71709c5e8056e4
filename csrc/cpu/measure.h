// Measure: the sums over a segment that a rule decides from.
#pragma once

#include <limits>
#include <type_traits>

#include "../chunk.h"

namespace robustft {

// The sums, in the order of methods.MEASURES: <g, d>, the size of d, and the size of c minus the size of d, without
// cancellation. The size of a tensor is |.|^2. The size of a row is the sum of magnitudes. A new measure is a name here
// and a line in BlockMeasure::add.
#define ROBUSTFT_MEASURES(X) X(grad_dot_delta) X(before) X(gain)
#define ROBUSTFT_COUNT(name) +1
constexpr int kMeasures = 0 ROBUSTFT_MEASURES(ROBUSTFT_COUNT);
#undef ROBUSTFT_COUNT
constexpr int kResults = kMeasures + 1;  // of a segment: its measures, and how often alpha was not 1

struct Measures {
#define ROBUSTFT_FIELD(name) double name = 0;
  ROBUSTFT_MEASURES(ROBUSTFT_FIELD)
#undef ROBUSTFT_FIELD

  void add(const Measures& from) {
#define ROBUSTFT_ADD(name) name += from.name;
    ROBUSTFT_MEASURES(ROBUSTFT_ADD)
#undef ROBUSTFT_ADD
  }
  static Measures filled(double value) {
    Measures all;
#define ROBUSTFT_FILL(name) all.name = value;
    ROBUSTFT_MEASURES(ROBUSTFT_FILL)
#undef ROBUSTFT_FILL
    return all;
  }
  static Measures read(const double* from) {
    Measures all;
#define ROBUSTFT_READ(name) all.name = *from++;
    ROBUSTFT_MEASURES(ROBUSTFT_READ)
#undef ROBUSTFT_READ
    return all;
  }
  void write(double* to) const {
#define ROBUSTFT_WRITE(name) *to++ = name;
    ROBUSTFT_MEASURES(ROBUSTFT_WRITE)
#undef ROBUSTFT_WRITE
  }
};

enum class Measuring : uint8_t { none, squares, magnitudes };

namespace {

// The sums of one block, each in kLanes accumulators of type T. At the end of the block they are folded into double.
template <class T, Measuring kMeasuring>
class BlockMeasure {
 public:
  // Adds numbers that belong to the k-th register of accumulators. d = param - anchor.
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
    Measures sums;
#define ROBUSTFT_SUM(name) sums.name = sum(name##_, used);
    ROBUSTFT_MEASURES(ROBUSTFT_SUM)
#undef ROBUSTFT_SUM
    sums.grad_dot_delta *= sign;
    return sums;
  }

 private:
  using Lanes = Vec<T>[kLanes / kWidth<T>];
#define ROBUSTFT_LANES(name) Lanes name##_ = {};
  ROBUSTFT_MEASURES(ROBUSTFT_LANES)
#undef ROBUSTFT_LANES

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
