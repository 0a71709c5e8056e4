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

// How a tensor divides into rows: a row's elements, counted in the order of memory, lie in runs of `stride`.
struct Rows {
  int64_t count = 1, length = 0, stride = 0;

  int64_t numel() const { return count * length; }
  bool contiguous() const { return count <= 1 || stride == length; }
  int64_t place(int64_t row, int64_t e) const {
    return contiguous() ? row * length + e : e / stride * (stride * count) + row * stride + e % stride;
  }
};

// What a rule adds to the gradient: linear * d, and sign * sign(d) on one row.
struct Penalty {
  double linear = 0, sign = 0;
  int64_t row = -1;
};

// One tensor of a step with all that belongs to it; its segments are its rows, or it is one row as a whole.
struct Param {
  Rows rows;
  Buffer param;
  Buffer working;   // where param is the float32 master of 16-bit weights: those
  Buffer grad;      // absent, where the base needs none
  Buffer anchor;    // absent: the anchor is zero
  Buffer state[3];  // AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq; SGD: momentum_buffer
  Buffer delta;     // where c goes, if anywhere
  Penalty penalty;
  double sign = 1;          // what turns the gradient into that of what the step minimizes
  int64_t seed = 0;         // of what is rounded stochastically:
  bool dithered = false;    // a bf16 param
  bool low_state = false;   // bf16 moments
};

// A part of a Param: rows from `row`, and of each the elements [begin, end).
struct Piece {
  int64_t row, rows, begin, end;
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
struct exact_bf16 { uint16_t bits; };  // of a value that is a bf16 already: nothing is left to round
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
inline float nearest_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u;
  return bit_cast<float>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : rounded);
}

inline void narrow(float x, exact_bf16& to) { to.bits = uint16_t(bit_cast<uint32_t>(x) >> 16); }

inline void narrow(float x, bf16& to) { to.bits = uint16_t(bit_cast<uint32_t>(nearest_bf16(x)) >> 16); }

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
inline void narrow(double x, exact_bf16& to) { narrow(float(x), to); }
inline void narrow(double x, f16& to) { narrow(float(x), to); }

// Where a block of a row lies: contiguous from `offset`, or element by element at `places`.
class Block {
 public:
  int n;

  Block(const Rows& rows, int64_t row, int64_t at, int n) : n(n), offset_(rows.place(row, at)) {
    if (rows.contiguous()) return;
    scattered_ = true;
    int64_t place = offset_, left = rows.stride - at % rows.stride;  // of this run
    for (int i = 0; i < n; ++i, ++place, --left) {
      if (left == 0) place += rows.stride * (rows.count - 1), left = rows.stride;
      places_[i] = place;
    }
  }

  bool scattered() const { return scattered_; }
  const int64_t* places() const { return places_; }
  int64_t operator[](int i) const { return scattered_ ? places_[i] : offset_ + i; }

 private:
  int64_t offset_;
  bool scattered_ = false;
  int64_t places_[kBlock];
};

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

template <class S, class T>
inline void load_as(const void* data, const Block& block, T* to) {
  if (!block.scattered()) return load_as<S>(data, block[0], block.n, to);
  const S* from = static_cast<const S*>(data);
  for (int i = 0; i < block.n; ++i) to[i] = T(widen(from[block.places()[i]]));
}

template <class S, class T>
inline void store_as(const T* from, void* data, const Block& block) {
  if (!block.scattered()) return store_as<S>(from, block.n, data, block[0]);
  S* to = static_cast<S*>(data);
  for (int i = 0; i < block.n; ++i) narrow(from[i], to[block.places()[i]]);
}

template <class T> constexpr DType kNative = DType::f32;
template <> constexpr DType kNative<double> = DType::f64;

template <class T>
void load(const Buffer& from, const Block& block, T* to) {
  switch (from.dtype) {
    case DType::f32: return load_as<float>(from.data, block, to);
    case DType::f64: return load_as<double>(from.data, block, to);
    case DType::bf16: return load_as<bf16>(from.data, block, to);
    case DType::f16: return load_as<f16>(from.data, block, to);
  }
}

template <class T>
void store(const T* from, const Block& block, const Buffer& to) {
  switch (to.dtype) {
    case DType::f32: return store_as<float>(from, to.data, block);
    case DType::f64: return store_as<double>(from, to.data, block);
    case DType::bf16: return store_as<bf16>(from, to.data, block);
    case DType::f16: return store_as<f16>(from, to.data, block);
  }
}

// What values of a tile become once they are stored.
template <class T>
void round_to(DType dtype, int n, T* values) {
  if (dtype == DType::bf16) {
#pragma omp simd
    for (int i = 0; i < n; ++i) values[i] = T(nearest_bf16(float(values[i])));
  } else if (dtype == DType::f16) {
    alignas(64) f16 stored[kTile];
    store_as<f16>(values, n, stored, 0);
    load_as<f16>(stored, 0, n, values);
  }
}

// A master weight counts as long as it rounds to the weight that is worked with: who writes that, writes both.
template <class T>
void reconcile(DType dtype, int n, const T* working, T* master) {
  alignas(64) T shown[kTile];
  std::memcpy(shown, master, n * sizeof(T));
  round_to(dtype, n, shown);
#pragma omp simd
  for (int i = 0; i < n; ++i) master[i] = shown[i] == working[i] ? master[i] : working[i];
}

// MurmurHash3's finalizer: every bit sways every bit of the result.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// What is rounded stochastically within a step, each with bits of its own.
enum class Phase : uint32_t { step, pull, moments };

inline uint32_t rounding_key(int64_t seed, double t, Phase phase) {
  return mix(mix(uint32_t(uint64_t(seed) >> 32) ^ mix(uint32_t(t) * 4 + uint32_t(phase))) ^ uint32_t(seed));
}

// A finite value becomes a bf16 neighbour, the upper one with the probability of its distance from the lower.
ROBUSTFT_INLINE float dithered(float value, uint32_t chance) {
  const uint32_t bits = bit_cast<uint32_t>(value), moved = (bits + chance) & 0xffff0000u;
  return bit_cast<float>((bits & 0x7f800000u) != 0x7f800000u ? moved : bits);
}

// The counter is the element's place in memory, from `offset`, and all must share its upper 32 bits. The second values,
// if there are any, take the other half of the random bits.
template <bool kTwo>
ROBUSTFT_INLINE void dither_within(int n, uint32_t key, int64_t offset, float* values, float* second) {
  const uint32_t low = uint32_t(offset), high = mix(key + uint32_t(offset >> 32));
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t random = mix(mix((low + uint32_t(i)) ^ key) + high);
    values[i] = dithered(values[i], random >> 16);
    if constexpr (kTwo) second[i] = dithered(second[i], random & 0xffff);
  }
}

template <bool kTwo>
ROBUSTFT_INLINE void dither_all(int n, uint32_t key, const Block& block, int i, float* values, float* second) {
  const int64_t first = block[i], ahead = (int64_t(1) << 32) - (first & 0xffffffff);
  const int near = block.scattered() ? 0 : int(n <= ahead ? n : ahead);
  if (near) dither_within<kTwo>(near, key, first, values, second);
  for (int k = near; k < n; ++k) dither_within<kTwo>(1, key, block[i + k], values + k, kTwo ? second + k : nullptr);
}

ROBUSTFT_INLINE void dither(int n, uint32_t key, const Block& block, int i, float* values, float* second = nullptr) {
  if (second)
    dither_all<true>(n, key, block, i, values, second);
  else
    dither_all<false>(n, key, block, i, values, nullptr);
}
inline void dither(int, uint32_t, const Block&, int, double*, double* = nullptr) {}  // float64 keeps its state alike

// A block of a buffer as numbers of the arithmetic type: the memory itself where it already holds that type
// (no copy), otherwise a staged conversion.
template <class T>
class View {
 public:
  // read: whether what is there is needed, or only written.
  View(const Buffer& buffer, const Block& block, bool read = true) : buffer_(buffer), block_(block) {
    if (buffer.data == nullptr) return;
    if (buffer.dtype == kNative<T> && !block.scattered()) {
      data_ = static_cast<T*>(buffer.data) + block[0];
    } else {
      if (read) load(buffer, block, stage_);
      data_ = stage_;
    }
  }
  View(const View&) = delete;

  T* data() const { return data_; }
  T* at(int i) const { return data_ ? data_ + i : nullptr; }
  // exact: whether all values are of the buffer's dtype already.
  void flush(bool exact = false) const {
    if (data_ != stage_) return;
    if (exact && buffer_.dtype == DType::bf16)
      store_as<exact_bf16>(stage_, buffer_.data, block_);
    else
      store(stage_, block_, buffer_);
  }

 private:
  const Buffer& buffer_;
  const Block& block_;
  T* data_ = nullptr;
  alignas(64) T stage_[kBlock];
};

}  // namespace
}  // namespace robustft
