// Setup: what one thread works out for all threads of a program, in shared memory.
#pragma once

#include "../base.h"
#include "../rounding.h"
#include "layout.h"

namespace robustft {
namespace {

constexpr int kMostThreads = 512;
constexpr double kInfinite = std::numeric_limits<double>::infinity();

// Shared memory for an object that has no constructor to run.
template <class Object>
struct Shared {
  alignas(16) unsigned char bytes[sizeof(Object)];
  __device__ Object& operator*() { return *reinterpret_cast<Object*>(bytes); }
};

struct Room {
  Room() = delete;
  union {
    double lanes[kTeams][kMeasures * kLanes];  // of each team's block
    Measures sums[kMostThreads];
    double numbers[kMostThreads];
  };
  Measures total;
  bool last;
};

struct Flags {
  bool measures;  // whether alpha waits for what is measured
  bool graded;    // whether there are gradients
  bool grads_apart, anchors_apart;  // whether these begin at no multiple of 16 bytes
};

template <class Base, class Hyper>
struct Setup {
  Setup() = delete;
  union {
    Hyper hyper;
    double columns[sizeof(Hyper) / sizeof(double)];
  };
  Param param;  // with its gradient
  Base base;
  Terms terms;
  Piece piece;
  double t, alpha;  // the step's number, and alpha if it is known before the sweep
  double linear, sign;
  uint32_t key, pull_key, moments_key;
  bool aligned;   // whether what is written begins at multiples of 16 bytes
  Flags flags;
  bool at_once;   // whether each row is decided and pulled as soon as it is measured
  int32_t owner;
};

__device__ __forceinline__ uint32_t misaligned(const Buffer& buffer) {
  return uint32_t(reinterpret_cast<uint64_t>(buffer.data) & 15);
}

__device__ __forceinline__ bool skips(const Args& args) { return args.found_inf && *args.found_inf != 0; }

// What one thread works out for all. It is not inlined, nor is what follows a loop over elements: its registers are then
// not those of the loop.
template <class Base, class Hyper>
__device__ __noinline__ void work_out(const Args& args, int32_t owner, Setup<Base, Hyper>& s) {
  const Entry& e = args.entries[owner];
  const double scale = args.grad_scale ? *args.grad_scale : 1;
  s.t = e.step ? *e.step + Base::kMoves : 0;
  s.base = Base(s.hyper, s.t, sign_of(s.hyper, scale));
  s.terms = terms_of(s.hyper);
  if (e.rule.learning != Learning::none) s.terms.radius = e.learned[0];
  s.piece = Pieces(e.param.rows)[blockIdx.x - e.program];
  s.alpha = e.rule.given ? 1 : alpha_of(e.rule.alpha, Measures::filled(0), s.terms);
  const Penalty penalty = e.rule.penalty(s.terms.strength);
  s.linear = e.rule.survey == Survey::conflict ? args.factors[owner] : penalty.linear, s.sign = penalty.sign;
  s.pull_key = rounding_key(e.param.seed, s.t, Phase::pull);
  s.key = Base::kMoves ? rounding_key(e.param.seed, s.t, Phase::step) : s.pull_key;
  s.moments_key = rounding_key(e.param.seed, s.t, Phase::moments);
  Param& p = s.param = e.param;
  p.grad.data = args.graded ? args.grads[owner] : nullptr;
  uint32_t odd = misaligned(p.param) | misaligned(p.working) | misaligned(p.delta);
  for (const Buffer& state : p.state) odd |= misaligned(state);
  s.aligned = odd == 0;
  s.flags = {e.rule.measuring != Measuring::none, bool(args.graded), misaligned(p.grad) != 0, misaligned(p.anchor) != 0};
  s.at_once = e.rule.pulls_at_once(Pieces(p.rows));
  s.owner = owner;
}

template <class Base, class Hyper>
__device__ void set_up(const Args& args, int32_t owner, Setup<Base, Hyper>& s) {
  constexpr int kColumns = sizeof(Hyper) / sizeof(double);
  if (threadIdx.x < kColumns) {
    const int64_t at = args.entries[owner].hyper + threadIdx.x, live = args.live ? args.live[at] : 0;
    s.columns[threadIdx.x] = live == 0  ? args.hyper[at]
                             : live & 1 ? *reinterpret_cast<const double*>(live - 1)
                                        : *reinterpret_cast<const float*>(live);
  }
  __syncthreads();
  if (threadIdx.x == 0) work_out(args, owner, s);
  __syncthreads();
}

}  // namespace
}  // namespace robustft
