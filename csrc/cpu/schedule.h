// Schedule: which thread crosses which part of memory, and when. The bits of the result do not depend on it.
#pragma once

#include <functional>
#include <vector>

#include "decide.h"
#include "sweeps.h"

namespace robustft {

constexpr int kMeasures = 4;  // <g, d>, before, gain, and how often alpha was not 1

// A tensor and what is to be done with it. Where the rule measures, sweep 1 measures and sweep 2 pulls; otherwise one
// sweep does all. A survey goes before.
struct Job {
  Param param;
  const Rule* rule;
  Terms terms;
  RadiusHyper radius_hyper;
  double t;
  bool graded;       // whether there is a gradient
  int row;           // of the hyper-parameters' table
  double* measures;  // kMeasures a segment, written: nan where the rule needs none
  double* alphas;    // one a segment, written, or read where they are given
  Radius* radius;    // where the rule learns one

  int64_t segments() const { return rule->rows ? param.rows.count : 1; }
};

using StepSweep = std::function<void(const Job&, const PerRow& alpha, const Piece&, Measuring, Measures* found)>;

// The sweeps for this processor, as torch sees it (ATEN_CPU_CAPABILITY lowers the choice).
const Sweeps& sweeps();

void run(std::vector<Job>& jobs, const StepSweep& step);

}  // namespace robustft
