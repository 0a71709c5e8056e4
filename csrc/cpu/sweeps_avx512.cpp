// The sweeps compiled for AVX512; schedule.cpp chooses them if the processor has it.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define ROBUSTFT_REGISTER 64
#define ROBUSTFT_SWEEPS kAvx512
#define ROBUSTFT_ISA "AVX512"
#include "sweeps.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
