// Schedule: which thread works on which part of memory, and when. The bits of the result do not depend on it.
#pragma once

#include <array>
#include <functional>
#include <vector>

#include "../decide.h"
#include "sweeps.h"

namespace robustft {

// A tensor and what is to be done with it. If the rule measures, sweep 1 measures and sweep 2 pulls. Otherwise one
// sweep does everything. A survey comes first.
struct Job {
  Param param;
  const Rule* rule;
  Terms terms;
  double t;
  bool graded;       // whether there is a gradient
  int row;           // of the hyper-parameters' table
  double* results;   // kResults per segment, written; all measures are nan if the rule measures nothing
  double* alphas;    // one per segment, written, or read if they are given
  double* learned;   // the numbers that the rule learns, if any; the first is the radius

  int64_t segments() const { return rule->by_rows ? param.rows.count : 1; }
};

// What the last step found of a segment.
inline Measures recorded(const Job& job, int64_t segment) { return Measures::read(job.results + kResults * segment); }

using StepSweep = std::function<void(const Job&, const PerRow& alpha, const Piece&, Measuring, Measures* found)>;

// The sweeps for this processor, as torch sees it (ATEN_CPU_CAPABILITY lowers the choice).
const Sweeps& sweeps();

void run(std::vector<Job>& jobs, const StepSweep& step);

// The index, in a whole tensor, of each element of a part of it. The part has these sizes, without gaps in memory, the
// last dimension innermost. The index grows by a step along each dimension.
struct Indices {
  std::vector<int64_t> sizes, steps;
  int64_t first;
};

using Sums = std::array<uint64_t, kDigests>;

// The digest of elements of so many bytes.
Sums digest(const void* bits, int width, const Indices& indices);

}  // namespace robustft
