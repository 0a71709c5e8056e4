// Decide: from measures to alpha. alpha = 1 leaves the segment alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "base.h"
#include "measure.h"

namespace robustft {

// The hyper-parameters that rules read. radius: the group's, or the one that was learned.
struct Terms {
#define ROBUSTFT_FIELD(name) double name;
  ROBUSTFT_FIELD(lr) ROBUSTFT_METHOD_HYPER(ROBUSTFT_FIELD)
#undef ROBUSTFT_FIELD
};

template <class Hyper>
Terms terms_of(const Hyper& h) {
  Terms terms;
#define ROBUSTFT_COPY(name) terms.name = h.name;
  ROBUSTFT_COPY(lr) ROBUSTFT_METHOD_HYPER(ROBUSTFT_COPY)
#undef ROBUSTFT_COPY
  return terms;
}

using Alpha = double (*)(const Measures&, const Terms&);
// One step of the numbers that a rule learns, on the slope; the first number is the radius.
using Learn = void (*)(double* numbers, double slope, double t, const Terms&);

inline double keep(const Measures&, const Terms&) { return 1; }

inline double l2sp(const Measures&, const Terms& t) { return 1 - std::min(1.0, t.strength * t.lr); }

inline double norm(const Measures& m) { return std::sqrt(std::max(m.before + m.gain, 0.0)); }

inline double row_norm(const Measures& m) { return m.before + m.gain; }

// Fires only if the progress is inconsistent and led away, and not for nan.
inline double shrink(double ratio, const Measures& m, double strength) {
  const bool fires = m.grad_dot_delta > 0 && m.gain > 0 && std::isfinite(ratio);
  return fires ? 1 - std::min(1.0, strength * ratio) : 1;
}

inline double spd(const Measures& m, const Terms& t) {
  const double before = std::sqrt(m.before), after = std::sqrt(m.before + m.gain);
  return shrink(m.gain / (before + after) / after, m, t.strength);
}

inline double spd_rows(const Measures& m, const Terms& t) { return shrink(m.gain / row_norm(m), m, t.strength); }

inline double within(double n, double radius) { return n > radius && std::isfinite(n) ? radius / n : 1; }

inline double project(const Measures& m, const Terms& t) { return within(norm(m), t.radius); }

inline double project_rows(const Measures& m, const Terms& t) { return within(row_norm(m), t.radius); }

constexpr double kRowEps = 1e-8;  // FTP's

inline double ftp(const Measures& m, const Terms& t) { return within(row_norm(m) + kRowEps, t.radius); }

// Makes one step of Adam on the slope. The numbers are the learned radius and the moments of its gradient, all 0 before
// the first step. The first step only sets the radius. A slope that is not finite changes nothing.
inline void learn(double* numbers, double slope, double t, const Terms& h) {
  constexpr double kSmallest = 1e-8;
  double &radius = numbers[0], &exp_avg = numbers[1], &exp_avg_sq = numbers[2];
  if (radius == 0) {
    radius = kSmallest, exp_avg = 0, exp_avg_sq = 0;
  } else if (std::isfinite(slope)) {
    if (slope > 0) slope *= h.k;
    exp_avg = h.radius_beta1 * exp_avg + (1 - h.radius_beta1) * slope;
    exp_avg_sq = h.radius_beta2 * exp_avg_sq + (1 - h.radius_beta2) * slope * slope;
    const double m = exp_avg / (1 - power(h.radius_beta1, t)), v = exp_avg_sq / (1 - power(h.radius_beta2, t));
    radius = std::max(kSmallest, radius - h.radius_lr * m / (std::sqrt(v) + 1e-8));
  }
}

// The functions of the rules that choose an alpha, by name. Python declares all other facts of a rule, in
// methods.RULES.
struct AlphaRow {
  const char* name;
  Alpha function;
};
constexpr AlphaRow kAlphas[] = {
    {"l2sp", l2sp}, {"spd", spd}, {"spd_rows", spd_rows}, {"project", project},
    {"project_mars", project_rows}, {"project_rows", project_rows}, {"ftp", ftp}, {"ftp_learned", ftp},
};

struct LearningRow {
  const char* name;
  Learn function;
  int64_t numbers;  // how many it learns
};
constexpr LearningRow kLearnings[] = {{"ftp", learn, 3}};

template <class Row, size_t n>
const Row& row_of(const Row (&rows)[n], const std::string& name) {
  for (const Row& row : rows)
    if (name == row.name) return row;
  throw std::invalid_argument("robustft: the native backend has no function for the rule '" + name + "'");
}

// What must be known of all rows of a tensor before its base step.
enum class Survey : uint8_t { none, slope, largest_row };

struct Rule {
  Measuring measuring = Measuring::none;  // none: alpha is known before the sweep
  bool by_rows = false;                   // segments are rows
  bool tied = false;                      // one alpha for all rows of a tensor, that of its largest
  bool given = false;                     // alpha is the caller's
  bool pulls = false;                     // alpha can be other than 1
  bool tracks = false;                    // the delta is kept
  bool linear = false, sign = false;      // the penalty that goes through the gradient
  Survey survey = Survey::none;
  Alpha alpha = nullptr;
  const LearningRow* learning = nullptr;

  Penalty penalty(double strength) const { return {linear ? strength : 0, sign ? strength : 0, -1}; }
};

}  // namespace robustft
