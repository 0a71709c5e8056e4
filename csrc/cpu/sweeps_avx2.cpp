// The sweeps compiled for AVX2; schedule.cpp chooses them if the processor has it.
#if defined(__x86_64__)
// Included before the target is raised: code from a standard header must run on every processor.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define ROBUSTFT_REGISTER 32
#define ROBUSTFT_SWEEPS kAvx2
#define ROBUSTFT_ISA "AVX2"
#include "sweeps.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
