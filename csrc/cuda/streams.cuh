// Streams: a few neighbours of a tensor at a time, from memory to numbers and back.
#pragma once

#include "../eight_bit.h"
#include "layout.h"

namespace robustft {
namespace {

constexpr int kUnknown = -1, kCodes = int(DType::i8);

// What a kernel is compiled for. T: the type of the arithmetic. kPlain: no tensor has a master, bf16 moments, a third
// moment, a delta, a penalty, stochastic rounding or an alpha other than 1 that is known before the sweep. k...As: the
// DTypes of the weights, gradients, anchors and the state, or kUnknown if those of the buffers count. kCodes: the moments
// are codes. kSide: how many neighbours a thread takes at once.
template <class T, bool kPlain_, int kParam, int kGrad, int kAnchor, int kState, int kSide_>
struct Kind {
  using Number = T;
  static constexpr bool kPlain = kPlain_;
  static constexpr int kParamAs = kParam, kGradAs = kGrad, kAnchorAs = kAnchor, kStateAs = kState;
  static constexpr bool kCoded = kState == kCodes;
  static constexpr int kSide = kSide_;
  static constexpr int kTeam = kLanes / kSide;  // threads that share a block
  static constexpr int kThreads = kTeams * kTeam;
  static_assert(kThreads == (sizeof(T) == 8 ? kThreads64 : robustft::kThreads));
};
constexpr int kF32 = int(DType::f32), kF64 = int(DType::f64), kBf16 = int(DType::bf16);
using F32 = Kind<float, true, kF32, kF32, kF32, kF32, 4>;
using F32Anchor16 = Kind<float, true, kF32, kF32, kBf16, kF32, 4>;
using Bf16 = Kind<float, true, kBf16, kBf16, kBf16, kF32, 4>;
using Any = Kind<float, false, kUnknown, kUnknown, kUnknown, kUnknown, 4>;
using Any8 = Kind<float, false, kUnknown, kUnknown, kUnknown, kCodes, 4>;
using Any64 = Kind<double, false, kF64, kUnknown, kUnknown, kF64, 2>;

template <int kKnown>
__device__ __forceinline__ DType dtype_of(const Buffer& buffer) {
  return kKnown == kUnknown ? buffer.dtype : DType(kKnown);
}

// The bits of a few neighbours, as they lie in memory. Beside float32 arithmetic, float64 numbers are converted as they
// are read.
template <class T, int kSide>
struct Image {
  static constexpr int kWords = (kSide * int(sizeof(T)) + 3) / 4;
  alignas(16) uint32_t words[kWords];
};

// The numbers of tensors are in global memory. From a bare address the compiler cannot know.
template <class Number>
__device__ __forceinline__ Number* global(const Buffer& buffer, int64_t place, int size) {
  char* const at = static_cast<char*>(buffer.data) + place * size;
  __builtin_assume(__isGlobal(at));
  return reinterpret_cast<Number*>(at);
}

template <int kBytes>
__device__ __forceinline__ void load_bytes(uint32_t* words, const char* from) {
  if constexpr (kBytes == 1) {
    words[0] = *reinterpret_cast<const uint8_t*>(from);
  } else if constexpr (kBytes == 2) {
    words[0] = *reinterpret_cast<const uint16_t*>(from);
  } else if constexpr (kBytes == 4) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(words) = *reinterpret_cast<const uint2*>(from);
  } else {
#pragma unroll
    for (int k = 0; k < kBytes / 16; ++k) reinterpret_cast<uint4*>(words)[k] = reinterpret_cast<const uint4*>(from)[k];
  }
}

template <int kBytes>
__device__ __forceinline__ void store_bytes(const uint32_t* words, char* to) {
  if constexpr (kBytes == 1) {
    *reinterpret_cast<uint8_t*>(to) = uint8_t(words[0]);
  } else if constexpr (kBytes == 2) {
    *reinterpret_cast<uint16_t*>(to) = uint16_t(words[0]);
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(words);
  } else {
#pragma unroll
    for (int k = 0; k < kBytes / 16; ++k) reinterpret_cast<uint4*>(to)[k] = reinterpret_cast<const uint4*>(words)[k];
  }
}

// Reads kSide neighbours from a place on, at a multiple of their size. Zeros if the buffer is absent.
template <class T, int kSide>
__device__ __forceinline__ void fetch(Image<T, kSide>& image, const Buffer& from, DType dtype, int64_t place) {
#pragma unroll
  for (uint32_t& word : image.words) word = 0;
  if (from.data == nullptr) return;
  const char* const at = global<char>(from, place, size_of(dtype));
  if (dtype == DType::f32) {
    load_bytes<4 * kSide>(image.words, at);
  } else if (dtype != DType::f64) {
    load_bytes<2 * kSide>(image.words, at);
  } else if constexpr (sizeof(T) == 8) {
    load_bytes<8 * kSide>(image.words, at);
  } else {
#pragma unroll
    for (int j = 0; j < kSide; ++j) image.words[j] = bit_cast<uint32_t>(float(reinterpret_cast<const double*>(at)[j]));
  }
}

// The same one by one, for memory that begins at no multiple of 16 bytes.
template <class T, int kSide>
__device__ __forceinline__ void fetch_apart(Image<T, kSide>& image, const Buffer& from, DType dtype, int64_t place) {
#pragma unroll
  for (uint32_t& word : image.words) word = 0;
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    Image<T, 1> one;
    fetch<T, 1>(one, from, dtype, place + j);
    if (sizeof(T) == 8 && dtype == DType::f64)
      image.words[2 * j] = one.words[0], image.words[2 * j + 1] = one.words[sizeof(T) / 8];
    else if (dtype == DType::bf16 || dtype == DType::f16)
      image.words[j / 2] |= one.words[0] << 16 * (j % 2);
    else
      image.words[j] = one.words[0];
  }
}

template <class T, int kSide>
__device__ __forceinline__ T number(const Image<T, kSide>& image, DType dtype, int j) {
  const uint16_t half = uint16_t(image.words[j / 2] >> 16 * (j % 2));
  if (dtype == DType::bf16) return from_bf16(half);
  if (dtype == DType::f16) return from_f16(half);
  if constexpr (sizeof(T) == 8)
    if (dtype == DType::f64) return bit_cast<double>(uint64_t(image.words[2 * j + 1]) << 32 | image.words[2 * j]);
  return bit_cast<float>(image.words[j]);
}

// Writes neighbours, rounded to nearest. Float64 arithmetic goes with float64 buffers, and float32 arithmetic with
// others.
template <class T, int kSide>
__device__ __forceinline__ void put(const T (&numbers)[kSide], const Buffer& to, DType dtype, int64_t place) {
  Image<T, kSide> image;
  if constexpr (sizeof(T) == 8) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      const uint64_t bits = bit_cast<uint64_t>(numbers[j]);
      image.words[2 * j] = uint32_t(bits), image.words[2 * j + 1] = uint32_t(bits >> 32);
    }
    store_bytes<8 * kSide>(image.words, global<char>(to, place, 8));
  } else if (dtype == DType::f32) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) image.words[j] = bit_cast<uint32_t>(numbers[j]);
    store_bytes<4 * kSide>(image.words, global<char>(to, place, 4));
  } else {
    const auto half = [&](int j) {
      if (j >= kSide) return uint32_t(0);
      return uint32_t(dtype == DType::bf16 ? to_bf16(nearest_bf16(numbers[j])) : to_f16(numbers[j]));
    };
#pragma unroll
    for (int j = 0; j < kSide; j += 2) image.words[j / 2] = half(j) | half(j + 1) << 16;
    store_bytes<2 * kSide>(image.words, global<char>(to, place, 2));
  }
}

}  // namespace
}  // namespace robustft
