// Digest: two sums over the elements of a tensor. They tell it from others, and add up over its parts.
#pragma once

#include <cstdint>

namespace robustft {

constexpr int kDigests = 2;

// Neighbours in memory, as unsigned integers of `width` bytes. `first` is the index of the first one in the whole
// tensor, and `step` is how much the index grows from one to the next.
struct Stretch {
  const void* bits;
  int width;
  int64_t n;
  uint64_t first, step;
};

// Adds what a stretch gives to the sums.
using DigestSweep = void (*)(const Stretch&, uint64_t* sums);

namespace {

// Odd numbers. An index times one of them is far from the same of any index near it.
constexpr uint64_t kWeyl[kDigests] = {0x9e3779b97f4a7c15u, 0xd1b54a32d192ed03u};

// MurmurHash3's finalizer for 64 bits.
inline uint64_t mix(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
  return x ^ x >> 33;
}

template <class Bits>
void digest_bits(const Stretch& of, uint64_t* sums) {
  const Bits* const bits = static_cast<const Bits*>(of.bits);
  const uint64_t a = of.first * kWeyl[0], by_a = of.step * kWeyl[0];
  const uint64_t b = of.first * kWeyl[1], by_b = of.step * kWeyl[1];
  uint64_t sum_a = 0, sum_b = 0;
  for (int64_t i = 0; i < of.n; ++i) {
    sum_a += mix(bits[i] + a + i * by_a);
    sum_b += mix(bits[i] + b + i * by_b);
  }
  sums[0] += sum_a, sums[1] += sum_b;
}

inline void digest_stretch(const Stretch& of, uint64_t* sums) {
  switch (of.width) {
    case 1: return digest_bits<uint8_t>(of, sums);
    case 2: return digest_bits<uint16_t>(of, sums);
    case 4: return digest_bits<uint32_t>(of, sums);
    default: return digest_bits<uint64_t>(of, sums);
  }
}

}  // namespace
}  // namespace robustft
