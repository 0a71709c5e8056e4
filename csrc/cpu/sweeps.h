// Sweeps: the crossings of memory. Each instruction set offers the same three.
#pragma once

#include "base.h"
#include "measure.h"

namespace robustft {

struct Sweeps {
  const char* isa;
  // Base step on [begin, end) of a segment at step t of its state. With `partial`, measures it; otherwise
  // pulls by the alpha that is known already, in the same pass.
  void (*adamw)(const Segment&, const AdamWHyper&, double t, double alpha, int64_t begin, int64_t end, Measures* partial);
  void (*sgd)(const Segment&, const SGDHyper&, double t, double alpha, int64_t begin, int64_t end, Measures* partial);
  void (*pull)(const Segment&, double t, double alpha, int64_t begin, int64_t end);
};

extern const Sweeps kBaseline;
#ifdef __x86_64__
extern const Sweeps kAvx2, kAvx512;
#endif

}  // namespace robustft
