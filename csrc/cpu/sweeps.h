// Sweeps: the passes over memory. Each instruction set offers the same. A pull is the base that makes no step.
#pragma once

#include "../base.h"
#include "digest.h"
#include "../measure.h"

namespace robustft {

// One number for each row, or the same for all.
struct PerRow {
  const double* values;
  bool shared;
  double operator[](int64_t row) const { return values[shared ? 0 : row]; }
};

// Makes the base step on a piece, at step t of its state. If it measures, it writes the measures of each row of the
// piece to `found`. Otherwise it pulls by the alpha that is known already, in the same pass.
template <class Hyper>
using BaseSweep = void (*)(const Param&, const Hyper&, double t, const PerRow& alpha, const Piece&, Measuring,
                           Measures* found);

struct Sweeps {
  const char* isa;
  BaseSweep<AdamWHyper> adamw;
  BaseSweep<SGDHyper> sgd;
  BaseSweep<NoStepHyper> no_step;
  DigestSweep digest;
};

extern const Sweeps kBaseline;
#ifdef __x86_64__
extern const Sweeps kAvx2, kAvx512;
#endif

}  // namespace robustft
