// Eight bits: moments as codes with a scale for each block of neighbours; core/eight_bit.py says what they stand for.
#pragma once

#include "rounding.h"

namespace robustft {

constexpr int kScaled = 32;  // neighbours that share a scale

namespace {

constexpr uint32_t kNanScale = 255, kMostScale = 253;

// kSigned: int8 codes, of first moments. Else uint8, of second moments.
template <bool kSigned>
struct EightBit {
  static constexpr float kMost = kSigned ? 127 : 255;
  static constexpr float kUnits = kSigned ? 0x1p14f : 0x1p16f;  // the square of a code is so many parts of the scale

  // 2^(e - 127), or nan; and its inverse, or 0.
  static ROBUSTFT_INLINE Vec<float> scale(Bits e) {
    return bit_cast<Vec<float>>(e == kNanScale ? Bits{} + 0x7fc00000u : e << 23);
  }
  static ROBUSTFT_INLINE Vec<float> inverse(Bits e) { return bit_cast<Vec<float>>(e == kNanScale ? Bits{} : (254 - e) << 23); }

  // The scale of a block, by the bits of its largest |x|. Those of what is not finite are larger than all others.
  static ROBUSTFT_INLINE Bits scale_for(Bits largest) {
    constexpr float kPart = float(double(kUnits) / (double(kMost) * kMost) * (1 - 0x1p-20));
    const Bits e = (bit_cast<Bits>(bit_cast<Vec<float>>(largest) * kPart) >> 23) + 1, most = Bits{} + kMostScale;
    return largest >= 0x7f800000u ? Bits{} + kNanScale : e < most ? e : most;
  }

  static ROBUSTFT_INLINE Vec<float> decoded(Vec<float> code, Vec<float> scale) {
    const Vec<float> size = bit_cast<Vec<float>>(bit_cast<Bits>(code) & 0x7fffffffu);
    return code * size * (1 / kUnits) * scale;
  }

  // Rounded to one of the two codes around x. The upper comes with the probability of the distance of x from what the
  // lower stands for. chance: 16 random bits.
  static ROBUSTFT_INLINE Vec<float> code(Vec<float> x, Vec<float> inverse, Bits chance) {
    const Bits bits = bit_cast<Bits>(x), magnitude = inverse == 0 ? Bits{} : bits & 0x7fffffffu;
    const Vec<float> squares = bit_cast<Vec<float>>(magnitude) * inverse * kUnits, one = Vec<float>{} + 1;
    Vec<float> k = truncated(lesser(root<float>(squares), Vec<float>{} + kMost));
    const Vec<float> beyond = squares - k * k, draw = converted<Vec<float>>(bit_cast<Ints>(chance)) * 0x1p-16f;
    k = lesser(draw * (k + k + one) < beyond ? k + one : k, Vec<float>{} + kMost);
    if constexpr (!kSigned) k = magnitude > 0 && k < one ? one : k;
    return bit_cast<Vec<float>>(bit_cast<Bits>(k) | (kSigned ? bits & 0x80000000u : Bits{}));
  }

 private:
  using Ints = typename Side<int32_t, kWidth<float>>::type;
  static ROBUSTFT_INLINE Vec<float> lesser(Vec<float> a, Vec<float> b) { return a < b ? a : b; }
  static ROBUSTFT_INLINE Vec<float> truncated(Vec<float> x) { return converted<Vec<float>>(converted<Ints>(x)); }
};

}  // namespace
}  // namespace robustft
