// Decide: from measures to alpha. alpha = 1 leaves the segment alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "measure.h"

namespace robustft {

// What a rule reads beside measures. radius: the group's, or the one that was learned.
struct Terms {
  double strength, lr, radius;
};

// What is to be known of all rows of a tensor before its base step.
enum class Survey : uint8_t { none, slope, largest_row };

inline double keep(const Measures&, const Terms&) { return 1; }

struct Rule {
  const char* name;
  Measuring measuring;  // none: alpha is known before the sweep
  bool rows;            // segments are rows
  double (*alpha)(const Measures&, const Terms&);
  bool tied = false;  // one alpha for all rows of a tensor, that of its largest
  Survey survey = Survey::none;
  bool given = false;  // alpha is the caller's
  bool couples = false;  // its penalty goes through the gradient, for all elements
  bool tracks = false;   // the delta is kept

  bool pulls() const { return alpha != keep; }
  Penalty penalty(double strength) const {
    return {couples ? strength : 0, survey == Survey::largest_row ? strength : 0, -1};
  }
};

inline double l2sp(const Measures&, const Terms& t) { return 1 - std::min(1.0, t.strength * t.lr); }

inline double norm(const Measures& m) { return std::sqrt(std::max(m.before + m.gain, 0.0)); }

inline double row_norm(const Measures& m) { return m.before + m.gain; }

// Only where the progress is inconsistent and led away; not for nan.
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

constexpr Rule kRules[] = {
    {"keep", Measuring::none, false, keep},
    {"l2sp", Measuring::none, false, l2sp},
    {"l2sp_coupled", Measuring::none, false, keep, false, Survey::none, false, true},
    {"mars_sp", Measuring::none, false, keep, false, Survey::largest_row},
    {"spd", Measuring::squares, false, spd},
    {"spd_rows", Measuring::magnitudes, true, spd_rows},
    {"project", Measuring::squares, false, project},
    {"project_mars", Measuring::magnitudes, true, project_rows, true},
    {"project_rows", Measuring::magnitudes, true, project_rows},
    {"ftp", Measuring::magnitudes, true, ftp, false, Survey::slope, false, false, true},
    {"observe", Measuring::squares, false, keep},
    {"observe_rows", Measuring::magnitudes, true, keep},
    {"track_rows", Measuring::magnitudes, true, keep, false, Survey::none, false, false, true},
    {"given", Measuring::none, false, nullptr, false, Survey::none, true},
    {"given_rows", Measuring::none, true, nullptr, false, Survey::none, true},
};

inline const Rule& rule_of(const std::string& name) {
  for (const Rule& rule : kRules)
    if (name == rule.name) return rule;
  throw std::invalid_argument("robustft: the native backend knows no rule '" + name + "'");
}

// A learned radius, and the moments of its gradient; 0 before the first step.
struct Radius {
  double value, exp_avg, exp_avg_sq;
};

struct RadiusHyper {
  double k, lr, beta1, beta2;
};

// One step of Adam on the slope; the first step only sets the radius, and a slope that is not finite does nothing.
inline void learn(Radius& radius, double slope, double t, const RadiusHyper& h) {
  constexpr double kSmallest = 1e-8;
  if (radius.value == 0) {
    radius = {kSmallest, 0, 0};
  } else if (std::isfinite(slope)) {
    if (slope > 0) slope *= h.k;
    radius.exp_avg = h.beta1 * radius.exp_avg + (1 - h.beta1) * slope;
    radius.exp_avg_sq = h.beta2 * radius.exp_avg_sq + (1 - h.beta2) * slope * slope;
    const double m = radius.exp_avg / (1 - std::pow(h.beta1, t)), v = radius.exp_avg_sq / (1 - std::pow(h.beta2, t));
    radius.value = std::max(kSmallest, radius.value - h.lr * m / (std::sqrt(v) + 1e-8));
  }
}

}  // namespace robustft
