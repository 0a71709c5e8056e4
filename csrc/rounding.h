// Rounding: to 16-bit floats, to nearest or stochastically, and back.
#pragma once

#include "param.h"

namespace robustft {
namespace {

struct bf16 {
  uint16_t bits;
};

using Halves = Side<uint16_t, kWidth<float>>::type;  // as many as there are floats in a register

// One instruction can do this. GCC takes four.
ROBUSTFT_INLINE Bits extended(Halves halves) {
#if defined(__x86_64__) && ROBUSTFT_REGISTER == 64
  return bit_cast<Bits>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(halves)));
#elif defined(__x86_64__) && ROBUSTFT_REGISTER == 32
  return bit_cast<Bits>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(halves)));
#else
  return converted<Bits>(halves);
#endif
}

ROBUSTFT_INLINE Vec<float> from_bf16(Halves bits) { return bit_cast<Vec<float>>(extended(bits) << 16); }

// Without rounding. For values that are bf16 already, all their bits.
ROBUSTFT_INLINE Halves to_bf16(Vec<float> x) {
  const Bits upper = bit_cast<Bits>(x) >> 16;
#if defined(__x86_64__) && ROBUSTFT_REGISTER == 32
  const __m256i both = bit_cast<__m256i>(upper);
  return bit_cast<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#else
  return converted<Halves>(upper);
#endif
}

// Numbers as they lie in memory.
ROBUSTFT_INLINE Vec<float> get(const float* from) { return read<Vec<float>>(from); }
ROBUSTFT_INLINE Vec<double> get(const double* from) { return read<Vec<double>>(from); }
ROBUSTFT_INLINE Vec<float> get(const bf16* from) { return from_bf16(read<Halves>(from)); }

ROBUSTFT_INLINE void put(Vec<float> v, float* to) { write(v, to); }
ROBUSTFT_INLINE void put(Vec<double> v, double* to) { write(v, to); }
ROBUSTFT_INLINE void put(Vec<float> v, bf16* to) { write(to_bf16(v), to); }

// To nearest, ties to even; nan stays nan.
ROBUSTFT_INLINE Vec<float> nearest_bf16(Vec<float> x) {
  const Bits bits = bit_cast<Bits>(x), nan = Bits{} + 0x7fc00000u;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u;
  return bit_cast<Vec<float>>(x != x ? nan : rounded);
}

ROBUSTFT_INLINE Vec<float> from_f16(Halves half) {
  const Bits bits = extended(half);
  const Bits magnitude = (bits & 0x7fff) << 13;    // exponent and fraction, in float's places
  const Bits normal = magnitude + (112u << 23);    // exponent bias 15 becomes 127
  const Bits special = magnitude + (224u << 23);   // inf and nan
  const Bits subnormal = bit_cast<Bits>(bit_cast<Vec<float>>(magnitude + (113u << 23)) - 0x1p-14f);
  const Bits finite = magnitude < 0x00800000u ? subnormal : normal;
  return bit_cast<Vec<float>>((magnitude >= 0x0f800000u ? special : finite) | (bits & 0x8000) << 16);
}

// To nearest, ties to even.
ROBUSTFT_INLINE Halves to_f16(Vec<float> x) {
  const Bits bits = bit_cast<Bits>(x), magnitude = bits & 0x7fffffffu, rebased = magnitude - (112u << 23);
  const Bits normal = (rebased + 0xfffu + ((rebased >> 13) & 1)) >> 13;
  // Next to 0.5 a float's last place is 2^-24, the spacing of half's subnormals: the addition rounds.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
  const Bits nan = Bits{} + 0x7e00u, inf = Bits{} + 0x7c00u;  // 65520 and beyond round to inf
  const Bits special = magnitude > 0x7f800000u ? nan : inf;
  return converted<Halves>((magnitude >= 0x477ff000u ? special : finite) | ((bits >> 16) & 0x8000u));
}

// Rounds to the nearest numbers of a dtype.
ROBUSTFT_INLINE Vec<float> nearest(DType dtype, Vec<float> v) {
  return dtype == DType::bf16 ? nearest_bf16(v) : dtype == DType::f16 ? from_f16(to_f16(v)) : v;
}
ROBUSTFT_INLINE Vec<double> nearest(DType, Vec<double> v) { return v; }  // float64 arithmetic goes with float64 weights

// A master weight counts as long as it rounds to the working weight. If not, somebody has written the working weight,
// and it replaces the master.
template <class V>
ROBUSTFT_INLINE V reconciled(DType dtype, V working, V master) {
  return nearest(dtype, master) == working ? master : working;
}

// MurmurHash3's finalizer: every bit affects every bit of the result. amid: is added between its rounds.
template <class U>
ROBUSTFT_INLINE U mix(U x, U amid = {}) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu + amid;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// The phases of a step that round stochastically. Each has random bits of its own.
enum class Phase : uint32_t { step, pull, moments };

ROBUSTFT_ANYWHERE inline uint32_t rounding_key(int64_t seed, double t, Phase phase) {
  return mix(mix(uint32_t(uint64_t(seed) >> 32) ^ mix(uint32_t(t) * 4 + uint32_t(phase))) ^ uint32_t(seed));
}

// 32 random bits for an element, from a key and the element's place in memory. What the upper half of the place gives is
// the same for most neighbours. It enters amid the rounds of `mix`. So for two keys the bits are not the same ones in
// another order, as they would be if a key came before the rounds alone.
ROBUSTFT_ANYWHERE inline uint32_t upper_bits(uint32_t key, int64_t place) {
  return mix(key + uint32_t(uint64_t(place) >> 32));
}
ROBUSTFT_INLINE Bits random_bits(uint32_t key, Bits lower, Bits upper) { return mix(lower ^ key, upper); }

// A value whose upper half is one of its bf16 neighbours. The probability of the upper neighbour is the distance from
// the lower. Inf and nan stay.
ROBUSTFT_INLINE Vec<float> dithered(Vec<float> value, Bits chance) {
  return bit_cast<Vec<float>>(bit_cast<Bits>(value) + (value == value ? chance : Bits{}));
}
// The neighbour itself.
ROBUSTFT_INLINE Vec<float> bf16_of(Vec<float> value) {
  return bit_cast<Vec<float>>(bit_cast<Bits>(value) & 0xffff0000u);
}

}  // namespace
}  // namespace robustft
