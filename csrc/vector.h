// Vector: numbers side by side, as many as a register holds. A translation unit sets how many bytes that is. In the
// code for a GPU it is one number: there, threads are side by side.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef __CUDACC__
#define ROBUSTFT_ANYWHERE __host__ __device__  // a function for the CPU and for the GPU
#define ROBUSTFT_INLINE __host__ __device__ __forceinline__
#else
#define ROBUSTFT_ANYWHERE
#define ROBUSTFT_INLINE inline __attribute__((always_inline))
#endif
#ifndef ROBUSTFT_REGISTER
#define ROBUSTFT_REGISTER 16
#endif

namespace robustft {

// Everything that depends on the width is compiled once for each width. Internal linkage keeps the copies apart.
namespace {

#ifdef __CUDACC__
template <class T>
constexpr int kWidth = 1;

template <class T, int kCount>
struct Side {
  using type = T;
};
#else
template <class T>
constexpr int kWidth = ROBUSTFT_REGISTER / sizeof(T);

template <class T, int kCount>
struct Side {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
#endif

template <class T>
using Vec = typename Side<T, kWidth<T>>::type;
using Bits = Vec<uint32_t>;
template <class T>
using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class To, class From>
ROBUSTFT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
ROBUSTFT_INLINE V read(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
ROBUSTFT_INLINE void write(V v, void* to) {
  std::memcpy(to, &v, sizeof v);
}

#ifdef __CUDACC__
template <class To, class From>
ROBUSTFT_INLINE To converted(From from) {
  return To(from);
}

// Rounded to nearest, as nvcc does it without -use_fast_math.
template <class T>
ROBUSTFT_INLINE T root(T x) {
  return std::sqrt(x);
}
#else
template <class To, class From>
ROBUSTFT_INLINE To converted(From from) {
  return __builtin_convertvector(from, To);
}

// 0, 1, 2, ...
template <class T>
ROBUSTFT_INLINE Vec<T> iota() {
  Vec<T> v;
  for (int l = 0; l < kWidth<T>; ++l) v[l] = T(l);
  return v;
}

// GCC has no operator for the square root.
#if defined(__clang__)
template <class T>
ROBUSTFT_INLINE Vec<T> root(Vec<T> x) {
  return __builtin_elementwise_sqrt(x);
}
#else
template <class T>
ROBUSTFT_INLINE Vec<T> root(Vec<T> x) {
#ifdef __x86_64__
  if constexpr (sizeof(T) == 4) {
#if ROBUSTFT_REGISTER == 64
    return (Vec<T>)_mm512_sqrt_ps((__m512)x);
#elif ROBUSTFT_REGISTER == 32
    return (Vec<T>)_mm256_sqrt_ps((__m256)x);
#else
    return (Vec<T>)_mm_sqrt_ps((__m128)x);
#endif
  } else {
#if ROBUSTFT_REGISTER == 64
    return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
#elif ROBUSTFT_REGISTER == 32
    return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
    return (Vec<T>)_mm_sqrt_pd((__m128d)x);
#endif
  }
#else
  for (int l = 0; l < kWidth<T>; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}
#endif
#endif

}  // namespace
}  // namespace robustft
