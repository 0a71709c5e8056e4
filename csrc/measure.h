// Measure: the sums over a segment that a rule decides from.
#pragma once

#include <limits>
#include <type_traits>

#include "param.h"

namespace robustft {

// The sums, in the order of methods.MEASURES: <g, d>, the size of d, and the size of c minus the size of d, without
// cancellation. The size of a tensor is |.|^2. The size of a row is the sum of magnitudes. A new measure is a name here
// and a line in BlockSums::add.
#define ROBUSTFT_MEASURES(X) X(grad_dot_delta) X(before) X(gain)
#define ROBUSTFT_COUNT(name) +1
constexpr int kMeasures = 0 ROBUSTFT_MEASURES(ROBUSTFT_COUNT);
#undef ROBUSTFT_COUNT
constexpr int kResults = kMeasures + 2;  // of a segment: its measures, how often alpha was not 1, and <g, d> above 0

struct Measures {
#define ROBUSTFT_FIELD(name) double name = 0;
  ROBUSTFT_MEASURES(ROBUSTFT_FIELD)
#undef ROBUSTFT_FIELD

  ROBUSTFT_ANYWHERE void operator+=(const Measures& from) {
#define ROBUSTFT_ADD(name) name += from.name;
    ROBUSTFT_MEASURES(ROBUSTFT_ADD)
#undef ROBUSTFT_ADD
  }
  ROBUSTFT_ANYWHERE static Measures filled(double value) {
    Measures all;
#define ROBUSTFT_FILL(name) all.name = value;
    ROBUSTFT_MEASURES(ROBUSTFT_FILL)
#undef ROBUSTFT_FILL
    return all;
  }
  ROBUSTFT_ANYWHERE static Measures read(const double* from) {
    Measures all;
#define ROBUSTFT_READ(name) all.name = *from++;
    ROBUSTFT_MEASURES(ROBUSTFT_READ)
#undef ROBUSTFT_READ
    return all;
  }
  // From sums of g as it is. `sign` turns it into the gradient of what the step minimizes.
  ROBUSTFT_ANYWHERE static Measures of_sums(const double* sums, double sign) {
    Measures all = read(sums);
    all.grad_dot_delta *= sign;
    return all;
  }
  ROBUSTFT_ANYWHERE void write(double* to) const {
#define ROBUSTFT_WRITE(name) *to++ = name;
    ROBUSTFT_MEASURES(ROBUSTFT_WRITE)
#undef ROBUSTFT_WRITE
  }
};

enum class Measuring : uint8_t { none, squares, magnitudes };

// The order of additions is the same everywhere, so the bits are too. Element i of a piece goes to lane i % kLanes.
// There, the elements of a block are added in their own type, one after the other, and then the blocks in double. Then
// the lanes of a piece are added, and then pieces: those of a group one after the other, and then the groups. Lanes,
// blocks and groups can each be left to a thread of their own.
constexpr int64_t kGroup = 64;

ROBUSTFT_ANYWHERE constexpr int64_t groups_of(int64_t n) { return (n + kGroup - 1) / kGroup; }

// The sum of group g of n values. at: a value by its index.
template <class Sum, class At>
ROBUSTFT_ANYWHERE Sum group_sum(int64_t g, int64_t n, const At& at) {
  Sum sum{};
  const int64_t end = (g + 1) * kGroup < n ? (g + 1) * kGroup : n;
  for (int64_t i = g * kGroup; i < end; ++i) sum += at(i);
  return sum;
}

// The sum of n values on one thread.
template <class Sum, class At>
ROBUSTFT_ANYWHERE Sum folded(int64_t n, const At& at) {
  Sum sum{};
  for (int64_t g = 0; g < groups_of(n); ++g) sum += group_sum<Sum>(g, n, at);
  return sum;
}

namespace {

// The sums of one block, as far as one thread adds them: in kRegisters accumulators of type T each.
template <class T, Measuring kMeasuring, int kRegisters>
struct BlockSums {
#define ROBUSTFT_LANES(name) Vec<T> name[kRegisters] = {};
  ROBUSTFT_MEASURES(ROBUSTFT_LANES)
#undef ROBUSTFT_LANES

  // Adds numbers that belong to the k-th register of accumulators. d = param - anchor.
  ROBUSTFT_INLINE void add(int k, Vec<T> param, Vec<T> next, Vec<T> grad, Vec<T> d) {
    const Vec<T> u = next - param, old = kMeasuring == Measuring::squares ? d * d : magnitude(d);
    grad_dot_delta[k] += grad * d;
    before[k] += old;
    if constexpr (kMeasuring == Measuring::squares)
      gain[k] += u * (d + d + u);
    else
      gain[k] += magnitude(u) <= old ? flipped(u, d) : magnitude(d + u) - old;
  }

  // The same where nothing moves, and the gain is 0.
  ROBUSTFT_INLINE void add_still(int k, Vec<T> grad, Vec<T> d) {
    grad_dot_delta[k] += grad * d;
    before[k] += kMeasuring == Measuring::squares ? d * d : magnitude(d);
  }

  // Calls f(m, the accumulators of the m-th sum) for each.
  template <class F>
  ROBUSTFT_INLINE void each(const F& f) const {
    int m = 0;
#define ROBUSTFT_CALL(name) f(m++, name);
    ROBUSTFT_MEASURES(ROBUSTFT_CALL)
#undef ROBUSTFT_CALL
  }

 private:
  static constexpr Integer<T> kSign = std::numeric_limits<Integer<T>>::min();
  static ROBUSTFT_INLINE Vec<T> magnitude(Vec<T> x) { return bit_cast<Vec<T>>(bit_cast<Vec<Integer<T>>>(x) & ~kSign); }
  static ROBUSTFT_INLINE Vec<T> flipped(Vec<T> x, Vec<T> sign) {
    return bit_cast<Vec<T>>(bit_cast<Vec<Integer<T>>>(x) ^ (bit_cast<Vec<Integer<T>>>(sign) & kSign));
  }
};

template <class T, int kRegisters>
struct BlockSums<T, Measuring::none, kRegisters> {
  ROBUSTFT_INLINE void add(int, Vec<T>, Vec<T>, Vec<T>, Vec<T>) {}
  template <class F>
  ROBUSTFT_INLINE void each(const F&) const {}
};

}  // namespace
}  // namespace robustft
