// Decide: from measures to alpha. alpha = 1 leaves the segment alone.
#pragma once

#include <algorithm>
#include <cmath>

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
ROBUSTFT_ANYWHERE Terms terms_of(const Hyper& h) {
  Terms terms;
#define ROBUSTFT_COPY(name) terms.name = h.name;
  ROBUSTFT_COPY(lr) ROBUSTFT_METHOD_HYPER(ROBUSTFT_COPY)
#undef ROBUSTFT_COPY
  return terms;
}

ROBUSTFT_ANYWHERE inline double keep(const Measures&, const Terms&) { return 1; }

ROBUSTFT_ANYWHERE inline double l2sp(const Measures&, const Terms& t) { return 1 - std::min(1.0, t.strength * t.lr); }

ROBUSTFT_ANYWHERE inline double norm(const Measures& m) { return std::sqrt(std::max(m.before + m.gain, 0.0)); }

ROBUSTFT_ANYWHERE inline double row_norm(const Measures& m) { return m.before + m.gain; }

// Fires only if the segment moved away, and not for nan.
ROBUSTFT_ANYWHERE inline double shrink(double ratio, const Measures& m, double strength) {
  return m.gain > 0 && std::isfinite(ratio) ? 1 - std::min(1.0, strength * ratio) : 1;
}

ROBUSTFT_ANYWHERE inline double spd_away(const Measures& m, const Terms& t) {
  const double before = std::sqrt(m.before), after = std::sqrt(m.before + m.gain);
  return shrink(m.gain / (before + after) / after, m, t.strength);
}

ROBUSTFT_ANYWHERE inline double spd_away_rows(const Measures& m, const Terms& t) {
  return shrink(m.gain / row_norm(m), m, t.strength);
}

// Fires only if the progress is inconsistent, too.
ROBUSTFT_ANYWHERE inline double spd(const Measures& m, const Terms& t) { return m.grad_dot_delta > 0 ? spd_away(m, t) : 1; }

ROBUSTFT_ANYWHERE inline double spd_rows(const Measures& m, const Terms& t) {
  return m.grad_dot_delta > 0 ? spd_away_rows(m, t) : 1;
}

ROBUSTFT_ANYWHERE inline double within(double n, double radius) { return n > radius && std::isfinite(n) ? radius / n : 1; }

ROBUSTFT_ANYWHERE inline double project(const Measures& m, const Terms& t) { return within(norm(m), t.radius); }

ROBUSTFT_ANYWHERE inline double project_rows(const Measures& m, const Terms& t) { return within(row_norm(m), t.radius); }

constexpr double kRowEps = 1e-8;  // FTP's

ROBUSTFT_ANYWHERE inline double ftp(const Measures& m, const Terms& t) { return within(row_norm(m) + kRowEps, t.radius); }

// Makes one step of Adam on the slope. The numbers are the learned radius and the moments of its gradient, all 0 before
// the first step. The first step only sets the radius. A slope that is not finite changes nothing.
ROBUSTFT_ANYWHERE inline void learn(double* numbers, double slope, double t, const Terms& h) {
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

// The rules that choose an alpha, each with its function. Python declares all other facts of a rule, in methods.RULES.
#define ROBUSTFT_ALPHAS(X) \
  X(keep, keep) X(l2sp, l2sp) X(l2sp_cautious, l2sp) X(spd, spd) X(spd_rows, spd_rows) X(spd_away, spd_away) \
  X(spd_away_rows, spd_away_rows) X(project, project) X(project_mars, project_rows) X(project_rows, project_rows) X(ftp, ftp) X(ftp_learned, ftp)
// The rules that learn, each with its function and how many numbers it learns.
#define ROBUSTFT_LEARNINGS(X) X(ftp, learn, 3)

#define ROBUSTFT_ENTRY(name, ...) name,
enum class Alpha : uint8_t { ROBUSTFT_ALPHAS(ROBUSTFT_ENTRY) };
enum class Learning : uint8_t { none, ROBUSTFT_LEARNINGS(ROBUSTFT_ENTRY) };
#undef ROBUSTFT_ENTRY

ROBUSTFT_ANYWHERE inline double alpha_of(Alpha which, const Measures& measures, const Terms& terms) {
  switch (which) {
#define ROBUSTFT_CASE(name, function) \
  case Alpha::name: return function(measures, terms);
    ROBUSTFT_ALPHAS(ROBUSTFT_CASE)
#undef ROBUSTFT_CASE
  }
  return 1;
}

ROBUSTFT_ANYWHERE inline void learn_by(Learning which, double* numbers, double slope, double t, const Terms& terms) {
  switch (which) {
#define ROBUSTFT_CASE(name, function, count) \
  case Learning::name: return function(numbers, slope, t, terms);
    ROBUSTFT_LEARNINGS(ROBUSTFT_CASE)
#undef ROBUSTFT_CASE
    case Learning::none: return;
  }
}

// What a row adds to FTP's slope. Its measures are of the last delta.
ROBUSTFT_ANYWHERE inline double slope_of(const Measures& m) { return m.grad_dot_delta / (m.before + kRowEps); }

// What DiGraP multiplies d with, for the gradient. The measures are of the whole tensor before the step.
ROBUSTFT_ANYWHERE inline double conflict(const Measures& m, const Terms& t) {
  const double factor = -std::min(1.0, t.strength) * m.grad_dot_delta / m.before;
  return m.grad_dot_delta < 0 && std::isfinite(factor) ? factor : 0;
}

// What must be known before the base step: of all rows of a tensor, or of the whole.
enum class Survey : uint8_t { none, slope, largest_row, conflict };

struct Rule {
  Measuring measuring = Measuring::none;  // none: alpha is known before the sweep
  bool by_rows = false;                   // segments are rows
  bool tied = false;                      // one alpha for all rows of a tensor, that of its largest
  bool given = false;                     // alpha is the caller's
  bool pulls = false;                     // alpha can be other than 1
  bool cautious = false;                  // the pull moves only elements whose step leads toward the anchor
  bool tracks = false;                    // the delta is kept
  bool linear = false, sign = false;      // the penalty that goes through the gradient
  Survey survey = Survey::none;
  Alpha alpha = Alpha::keep;
  Learning learning = Learning::none;

  // Whether a step must process the tensor row by row.
  ROBUSTFT_ANYWHERE bool crosses_rows() const {
    return by_rows || survey == Survey::slope || survey == Survey::largest_row;
  }
  // Whether each row is decided and pulled as soon as it is measured. If not, it waits for the whole tensor.
  ROBUSTFT_ANYWHERE bool pulls_at_once(const Pieces& pieces) const { return by_rows && !tied && !pieces.split(); }
  ROBUSTFT_ANYWHERE Penalty penalty(double strength) const { return {linear ? strength : 0, sign ? strength : 0, -1}; }
};

// What a survey measures. For the slope it is the delta with the gradient. For the largest row it is d, and for a
// conflict d with the gradient.
ROBUSTFT_ANYWHERE inline Param surveyed(Survey survey, const Param& of) {
  Param seen;
  seen.rows = of.rows, seen.sign = of.sign;
  if (survey == Survey::slope)
    seen.param = of.delta, seen.grad = of.grad;
  else
    seen.param = of.param, seen.working = of.working, seen.anchor = of.anchor;
  if (survey == Survey::conflict) seen.grad = of.grad;
  return seen;
}
ROBUSTFT_ANYWHERE constexpr Measuring measuring_of(Survey survey) {
  return survey == Survey::conflict ? Measuring::squares : Measuring::magnitudes;
}

// Writes what was found of a segment. graded: whether there was a gradient.
ROBUSTFT_ANYWHERE inline void record(double* results, double* alphas, int64_t segment, Measures m, double alpha,
                                     bool graded) {
  if (!graded) m.grad_dot_delta = std::numeric_limits<double>::quiet_NaN();
  double* const to = results + kResults * segment;
  alphas[segment] = alpha;
  m.write(to);
  to[kMeasures] += alpha != 1;
  to[kMeasures + 1] += m.grad_dot_delta > 0;
}

}  // namespace robustft
