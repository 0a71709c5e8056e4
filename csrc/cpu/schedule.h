// Schedule: which thread crosses which part of memory, and when. The bits of the result do not depend on it.
#pragma once

#include <functional>
#include <vector>

#include "decide.h"
#include "sweeps.h"

namespace robustft {

// A segment and what is to be done with it. Where `rule.measured`, sweep 1 measures and sweep 2 pulls;
// otherwise one sweep does all.
struct Job {
  Segment segment;
  Rule rule;
  double strength, lr, t;
  int row;           // of the hyper-parameters' table
  double* measures;  // three doubles, written: nan where the rule needs none
  double* alpha;     // written
};

using BaseSweep = std::function<void(const Job&, double alpha, int64_t begin, int64_t end, Measures* partial)>;

// The sweeps for this processor, as torch sees it (ATEN_CPU_CAPABILITY lowers the choice).
const Sweeps& sweeps();

void run(const std::vector<Job>& jobs, const BaseSweep& base_sweep);

}  // namespace robustft
