// Decide: from measures and strength to alpha. alpha = 1 leaves the segment alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "measure.h"

namespace robustft {

struct Rule {
  bool measured;  // alpha waits for the measures of the whole segment; otherwise it is known before the sweep
  double (*alpha)(const Measures&, double strength, double lr);
};

inline double keep(const Measures&, double, double) { return 1; }

inline double l2sp(const Measures&, double strength, double lr) { return 1 - std::min(1.0, strength * lr); }

inline double spd(const Measures& m, double strength, double) {
  if (!(m.grad_dot_delta > 0 && m.gain > 0)) return 1;  // consistent, or not farther away; nan too
  const double before = std::sqrt(m.delta_sq), after = std::sqrt(m.delta_sq + m.gain);
  const double ratio = m.gain / (before + after) / after;
  return std::isfinite(ratio) ? 1 - std::min(1.0, strength * ratio) : 1;
}

inline Rule rule_of(const std::string& name) {
  if (name == "keep") return {false, keep};
  if (name == "l2sp") return {false, l2sp};
  if (name == "spd") return {true, spd};
  throw std::invalid_argument("robustft: the native backend knows no rule '" + name + "'");
}

}  // namespace robustft
