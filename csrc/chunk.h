// Movement: what a segment is in memory, and how a block of it becomes numbers and goes back.
// No method is known here.
#pragma once

#include <cstdint>
#include <cstring>

#define ROBUSTFT_INLINE inline __attribute__((always_inline))

namespace robustft {

constexpr int64_t kChunk = 16384;  // elements that share one partial: the unit of a deterministic reduction
constexpr int64_t kBlock = 1024;  // elements staged at once, and folded from float lanes into double
constexpr int kTile = 64;          // elements in flight: all streams advance together, as prefetchers like it
constexpr int kLanes = 16;         // accumulators of a reduction: the same on every instruction set, so are the bits

enum class DType : uint8_t { f32, f64, bf16, f16 };

struct Buffer {
  void* data = nullptr;  // nullptr: absent
  DType dtype = DType::f32;
};

// One tensor of a step, flat in memory order.
struct Segment {
  int64_t numel = 0;
  Buffer param, grad;
  Buffer anchor;    // absent: the anchor is zero
  Buffer state[3];  // AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq; SGD: momentum_buffer
  double grad_scale = 1;  // what the gradient is to be divided by
  int64_t seed = -1;      // of a bf16 param's stochastic rounding; negative: round to nearest
};

// A length that the compiler knows: loops of a full tile have no remainder.
template <int kValue>
struct Count {
  constexpr operator int() const { return kValue; }
};

// Everything below is compiled once for each instruction set; internal linkage keeps the copies apart.
namespace {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline float widen(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

inline float widen(f16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;  // exponent and fraction, in float's places
  const uint32_t normal = magnitude + (112u << 23);            // exponent bias 15 becomes 127
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude + (113u << 23)) - 0x1p-14f);
  const uint32_t special = magnitude + (224u << 23);  // inf and nan
  const uint32_t bits = magnitude < 0x00800000u ? subnormal : magnitude >= 0x0f800000u ? special : normal;
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
}

// Round to nearest, ties to even; nan stays nan.
inline void narrow(float x, bf16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void narrow(float x, f16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t rebased = magnitude - (112u << 23);
  const uint32_t normal = (rebased + 0xfffu + ((rebased >> 13) & 1)) >> 13;
  // Next to 0.5 a float's last place is 2^-24, the spacing of half's subnormals: the addition rounds.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // 65520 and beyond round to inf
  to.bits = uint16_t((magnitude >= 0x477ff000u ? special : finite) | ((bits >> 16) & 0x8000u));
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline void narrow(double x, float& to) { to = float(x); }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(double x, bf16& to) { narrow(float(x), to); }
inline void narrow(double x, f16& to) { narrow(float(x), to); }

template <class S, class T>
inline void load_as(const void* data, int64_t offset, int n, T* to) {
  const S* from = static_cast<const S*>(data) + offset;
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = T(widen(from[i]));
}

template <class S, class T>
inline void store_as(const T* from, int n, void* data, int64_t offset) {
  S* to = static_cast<S*>(data) + offset;
#pragma omp simd
  for (int i = 0; i < n; ++i) narrow(from[i], to[i]);
}

template <class T> constexpr DType kNative = DType::f32;
template <> constexpr DType kNative<double> = DType::f64;

template <class T>
void load(const Buffer& from, int64_t offset, int n, T* to) {
  switch (from.dtype) {
    case DType::f32: return load_as<float>(from.data, offset, n, to);
    case DType::f64: return load_as<double>(from.data, offset, n, to);
    case DType::bf16: return load_as<bf16>(from.data, offset, n, to);
    case DType::f16: return load_as<f16>(from.data, offset, n, to);
  }
}

template <class T>
void store(const T* from, int n, const Buffer& to, int64_t offset) {
  switch (to.dtype) {
    case DType::f32: return store_as<float>(from, n, to.data, offset);
    case DType::f64: return store_as<double>(from, n, to.data, offset);
    case DType::bf16: return store_as<bf16>(from, n, to.data, offset);
    case DType::f16: return store_as<f16>(from, n, to.data, offset);
  }
}

// What a value becomes once it is stored.
template <class T>
void round_to(DType dtype, int n, T* values) {
  alignas(64) char stored[kTile * sizeof(T)];
  const Buffer buffer{stored, dtype};
  store(values, n, buffer, 0);
  load(buffer, 0, n, values);
}

// MurmurHash3's finalizer: every bit sways every bit of the result.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// The key of one stochastic rounding of a tensor: of its seed, the step and, within the step, the sweep.
inline uint32_t rounding_key(int64_t seed, double t, uint32_t phase) {
  return mix(mix(uint32_t(uint64_t(seed) >> 32) ^ mix(uint32_t(t) * 2 + phase)) ^ uint32_t(seed));
}

// Values become a bf16 neighbour, the upper one with the probability of their distance from the lower; the counter is
// the element's place in memory. `offset` is a multiple of kTile, so that 32 bits of it are the same for all.
ROBUSTFT_INLINE void dither(int n, uint32_t key, int64_t offset, float* values) {
  const uint32_t low = uint32_t(offset), high = mix(key + uint32_t(offset >> 32));
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bit_cast<uint32_t>(values[i]);
    const uint32_t moved = (bits + (mix(mix((low + uint32_t(i)) ^ key) + high) >> 16)) & 0xffff0000u;
    values[i] = bit_cast<float>((bits & 0x7f800000u) != 0x7f800000u ? moved : bits);
  }
}
inline void dither(int, uint32_t, int64_t, double*) {}  // a float64 param is never bf16

// A block of a buffer as numbers of the arithmetic type: the memory itself where it already holds that type
// (no copy), otherwise a staged conversion.
template <class T>
class View {
 public:
  View(const Buffer& buffer, int64_t offset, int n) : buffer_(buffer), offset_(offset), n_(n) {
    if (buffer.data == nullptr) return;
    if (buffer.dtype == kNative<T>) {
      data_ = static_cast<T*>(buffer.data) + offset;
    } else {
      load(buffer, offset, n, stage_);
      data_ = stage_;
    }
  }
  View(const View&) = delete;

  T* data() const { return data_; }
  T* at(int i) const { return data_ ? data_ + i : nullptr; }
  bool staged() const { return data_ == stage_; }
  void flush() const {
    if (staged()) store(stage_, n_, buffer_, offset_);
  }

 private:
  const Buffer& buffer_;
  int64_t offset_;
  int n_;
  T* data_ = nullptr;
  alignas(64) T stage_[kBlock];
};

}  // namespace
}  // namespace robustft
