// Layout: what the host hands to the kernels. Both sides include this.
#pragma once

#include "../decide.h"

namespace robustft {

// The name of an empty kernel that tells from which sources this was compiled. Only kernels with the host's are taken.
#ifndef ROBUSTFT_SOURCES
#define ROBUSTFT_SOURCES unknown
#endif
#define ROBUSTFT_JOINED(a, b) a##b
#define ROBUSTFT_NAMED(a, b) ROBUSTFT_JOINED(a, b)
#define ROBUSTFT_SIGNATURE ROBUSTFT_NAMED(compiled_from_, ROBUSTFT_SOURCES)

constexpr int kTeams = 64;  // of threads, in a program. Each adds up a block of its own.
static_assert(kTeams * kBlock == kChunk, "a chunk is one round of all teams");
// Threads of a program: a team has kLanes of numbers, and a thread takes 16 bytes of float32 or of float64 numbers.
constexpr int kThreads = kTeams * kLanes / 4, kThreads64 = kTeams * kLanes / 2;

// A tensor of a step. The address of its gradient and its hyper-parameters come with each step.
struct Entry {
  Param param;
  Rule rule;
  int64_t hyper;             // where the hyper-parameters of its group begin
  int64_t segment;           // its first in results and alphas
  int64_t found;             // its first in Args::found
  int32_t program, programs; // its first, and how many
  float* step;               // nullptr: nobody counts its steps
  double* learned;           // nullptr: its rule learns nothing
};

// What a launch is told. A program is a block of threads, and works on one piece of one tensor.
struct Args {
  const Entry* entries;
  const int32_t* owners;     // the entry of each program
  void* const* grads;        // of each entry
  const double* hyper;
  const int64_t* live;       // for each hyper-parameter the address of a tensor that holds it, plus 1 if it is float64.
                             // 0: the table holds it. nullptr: it holds all.
  Measures* found;           // what sweeps have measured of parts of segments
  int32_t* counters;         // of each entry: how many programs are done
  int64_t* largest;          // of each entry: the row that a survey has found
  double* factors;           // of each entry: the factor of its penalty that a survey has found
  double *results, *alphas;
  double* squared;           // of each entry, and after them the sum over all: the squares of gradients
  const float *grad_scale, *found_inf;  // nullptr: 1 and 0
  int64_t graded;            // whether there are gradients
  int64_t tensors;           // how many
};

}  // namespace robustft
