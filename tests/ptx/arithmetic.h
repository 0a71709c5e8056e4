// The numbers of PTX: bits to numbers and back, rounding, and what C++ leaves undefined.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u128 = unsigned __int128;
using s128 = __int128;

template <class To, class From>
static inline To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
static inline float F(u32 x) { return as<float>(x); }
static inline double D(u64 x) { return as<double>(x); }
static inline float H(u16 x) { return as<_Float16>(x); }
static inline float BF(u16 x) { return F((u32)x << 16); }
static inline u32 bits(float x) { return as<u32>(x); }
static inline u64 bits(double x) { return as<u64>(x); }

static inline u16 to_half(float x) { return x != x ? 0x7FFF : as<u16>((_Float16)x); }
static inline u16 to_bfloat(float x) {
  u32 b = bits(x);
  return x != x ? 0x7FFF : (u16)((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}
static inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// Off by up to `most` units in the last place, by how the bits of the exact result fall. A program that relies on an
// approximate instruction's last bits then fails.
static inline float near(float exact, int most) {
  u32 b = bits(exact), magnitude = b & 0x7FFFFFFF;
  if (magnitude < 0x01000000 || magnitude > 0x7E000000) return exact;  // 0, subnormal, or near the ends
  return F(b + (int)(b * 2654435769u >> 16) % (2 * most + 1) - most);
}

template <class T>
static inline T least(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}
template <class T>
static inline T most(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}
// A nan gives 0, but among 64 bits the number whose highest bit alone is set.
template <class I, class T>
static inline I truncated(T x) {
  using Limits = std::numeric_limits<I>;
  if (x != x) return sizeof(I) < 8 && sizeof(T) < 8 ? I(0) : I(u64(1) << (sizeof(I) * 8 - 1));
  if (x <= (T)Limits::min()) return Limits::min();
  if (x >= (T)Limits::max()) return Limits::max();
  return (I)x;
}
template <class T>
static inline T shifted_left(T a, u32 by) {
  return by >= sizeof(T) * 8 ? T(0) : T(a << by);
}
template <class T>
static inline T shifted_right(T a, u32 by) {
  if (by >= sizeof(T) * 8) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
  return T(a >> by);
}
template <class T>  // by 0, a number that the manual leaves open; the least one by -1 is itself
static inline T divided(T a, T b) {
  if (b == 0) return T(-1);
  return std::is_signed_v<T> && b == T(-1) ? T(0 - std::make_unsigned_t<T>(a)) : T(a / b);
}
template <class T>
static inline T remainder_of(T a, T b) {
  if (b == 0) return T(-1);
  return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}
template <class T>
static inline T product_high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, s128, u128>;
  return T(Wide(a) * Wide(b) >> sizeof(T) * 8);
}
template <class T>
static inline T with_field(T a, T b, u32 position, u32 length) {
  constexpr u32 width = sizeof(T) * 8;
  position &= 255, length &= 255;
  if (length == 0 || position >= width) return b;
  T mask = T((length >= width ? ~T(0) : T((T(1) << length) - 1)) << position);
  return T((b & ~mask) | (T(a << position) & mask));
}
static inline u32 permuted(u32 a, u32 b, u32 selectors) {
  u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (u32 k = 0; k < 4; k++) {
    u32 selector = selectors >> 4 * k;
    u8 byte = u8(bytes >> 8 * (selector & 7));
    if (selector & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= (u32)byte << 8 * k;
  }
  return result;
}
static inline u32 bit_field(u32 a, u32 position, u32 length) {
  if (length == 0 || position >= 32) return 0;
  return length >= 32 ? a >> position : a >> position & ((1u << length) - 1);
}
