// Tile: how a block of a segment is loaded as numbers and stored again. No method is known here.
#pragma once

#include <algorithm>

#include "../eight_bit.h"

namespace robustft {

constexpr int kTile = kBlock;  // elements that are converted at once, in the innermost cache
constexpr int kShort = 64;     // a row with at most so many elements shares a tile with other rows
constexpr int kAhead = 512;    // how many bytes ahead of its use memory is prefetched

namespace {

inline int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Elements that lie side by side from `place` on, or up to kTile that lie at `places`.
struct Tile {
  int n;
  int64_t place;
  const int64_t* places = nullptr;
  bool copied = false;  // numbers after its end will be read too

  // Whether memory can be used directly, a register at a time.
  bool whole() const { return places == nullptr && n % kLanes == 0 && !copied; }
};

// Elements [at, at + n) of a row that does not lie side by side. Writes their places to `to`, and zeros after them up
// to the next multiple of kLanes.
inline Tile gathered(const Rows& rows, int64_t row, int64_t at, int n, int64_t* to) {
  int64_t place = rows.place(row, at), left = rows.stride - at % rows.stride;  // of this run
  for (int i = 0; i < n; ++i, ++place, --left) {
    if (left == 0) place += rows.stride * (rows.count - 1), left = rows.stride;
    to[i] = place;
  }
  std::fill(to + n, to + padded(n), 0);
  return {n, to[0], to};
}

// Reads as many numbers as a register holds from memory of dtype kFrom.
template <DType kFrom, class T>
ROBUSTFT_INLINE Vec<T> widened(const char* from) {
  if constexpr (kFrom == kNative<T>) return read<Vec<T>>(from);
  if constexpr (sizeof(T) == 4 && kFrom == DType::bf16) return from_bf16(read<Halves>(from));
  if constexpr (sizeof(T) == 4 && kFrom == DType::f16) return from_f16(read<Halves>(from));
  Vec<T> v;
  if constexpr (kFrom == DType::f64) {
    for (int l = 0; l < kWidth<T>; ++l) v[l] = T(read<double>(from + 8 * l));
  } else {  // half a register of floats
    alignas(64) char room[ROBUSTFT_REGISTER] = {};
    std::memcpy(room, from, kWidth<T> * size_of(kFrom));
    const Vec<float> narrow = widened<kFrom, float>(room);
    for (int l = 0; l < kWidth<T>; ++l) v[l] = T(narrow[l]);
  }
  return v;
}

// Writes numbers to memory of dtype kTo, rounded to nearest. exact: they are of that dtype already.
template <DType kTo, class T>
ROBUSTFT_INLINE void narrowed(Vec<T> v, char* to, bool exact) {
  if constexpr (kTo == kNative<T>) return write(v, to);
  if constexpr (sizeof(T) == 4 && kTo == DType::bf16) return write(to_bf16(exact ? v : nearest_bf16(v)), to);
  if constexpr (sizeof(T) == 4 && kTo == DType::f16) return write(to_f16(v), to);
  if constexpr (kTo == DType::f64) {
    for (int l = 0; l < kWidth<T>; ++l) write(double(v[l]), to + 8 * l);
  } else {
    alignas(64) char room[ROBUSTFT_REGISTER];
    Vec<float> narrow = {};
    for (int l = 0; l < kWidth<T>; ++l) narrow[l] = float(v[l]);
    narrowed<kTo, float>(narrow, room, exact);
    std::memcpy(to, room, kWidth<T> * size_of(kTo));
  }
}

template <class F>
ROBUSTFT_INLINE void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(std::integral_constant<DType, DType::f32>());
    case DType::f64: return f(std::integral_constant<DType, DType::f64>());
    case DType::bf16: return f(std::integral_constant<DType, DType::bf16>());
    case DType::f16: return f(std::integral_constant<DType, DType::f16>());
    case DType::i8:
    case DType::u8: return;  // codes become numbers in `decode`
  }
}

// Copies one element as it is.
inline void move(char* to, const char* from, int size) {
  size == 4 ? std::memcpy(to, from, 4) : size == 2 ? std::memcpy(to, from, 2) : std::memcpy(to, from, 8);
}

// Loads a tile as numbers, with zeros after it up to the next multiple of kLanes.
template <class T>
void load(const Buffer& buffer, const Tile& tile, T* to) {
  alignas(64) char room[kTile * 8];
  const int size = size_of(buffer.dtype), n = padded(tile.n);
  const char *const data = static_cast<const char*>(buffer.data), *from = data + tile.place * size;
  if (tile.whole()) {
    for (int b = 0; b < n * size; b += 64) __builtin_prefetch(from + b + kAhead);
  } else {
    if (tile.places)
      for (int i = 0; i < tile.n; ++i) move(room + i * size, data + tile.places[i] * size, size);
    else
      std::memcpy(room, from, tile.n * size);
    std::memset(room + tile.n * size, 0, (n - tile.n) * size);
    from = room;
  }
  with_dtype(buffer.dtype, [&](auto dtype) {
    for (int i = 0; i < n; i += kWidth<T>) write(widened<dtype, T>(from + i * size_of(dtype)), to + i);
  });
}

template <class T>
void store(const T* from, const Tile& tile, const Buffer& buffer, bool exact) {
  alignas(64) char room[kTile * 8];
  const int size = size_of(buffer.dtype), n = padded(tile.n);
  char *const data = static_cast<char*>(buffer.data), *const to = tile.whole() ? data + tile.place * size : room;
  with_dtype(buffer.dtype, [&](auto dtype) {
    for (int i = 0; i < n; i += kWidth<T>) narrowed<dtype, T>(read<Vec<T>>(from + i), to + i * size_of(dtype), exact);
  });
  if (to != room) return;
  if (tile.places)
    for (int i = 0; i < tile.n; ++i) move(data + tile.places[i] * size, room + i * size, size);
  else
    std::memcpy(data + tile.place * size, room, tile.n * size);
}

template <class T>
void round_to(DType dtype, int n, T* values) {
  for (int i = 0; i < n; i += kWidth<T>) write(nearest(dtype, read<Vec<T>>(values + i)), values + i);
}

template <class T>
void reconcile(DType dtype, int n, const T* working, T* master) {
  for (int i = 0; i < n; i += kWidth<T>)
    write(reconciled(dtype, read<Vec<T>>(working + i), read<Vec<T>>(master + i)), master + i);
}

// Random bits for the elements from a place in memory on.
class Chance {
 public:
  Chance() = default;
  Chance(uint32_t key, int64_t place) : key_(key), lower_(uint32_t(place)), upper_(upper_bits(key, place)) {}

  // Whether the upper half of the place is not that of all n elements. Then `at` must not be used.
  static bool splits(int64_t place, int64_t n) { return place >> 32 != (place + n + kLanes) >> 32; }

  // Those of the elements from the i-th on.
  ROBUSTFT_INLINE Bits at(int i) const {
    return random_bits(key_, iota<uint32_t>() + (lower_ + uint32_t(i)), Bits{} + upper_);
  }

 private:
  uint32_t key_ = 0, lower_ = 0, upper_ = 0;
};

// The same, at any places.
inline Bits chance_at(uint32_t key, const int64_t* places) {
  Bits lower, upper;
  for (int l = 0; l < kWidth<float>; ++l) lower[l] = uint32_t(places[l]), upper[l] = upper_bits(key, places[l]);
  return random_bits(key, lower, upper);
}

// Calls f(i, bits) with random bits for each register of a tile.
template <class F>
ROBUSTFT_INLINE void with_chances(uint32_t key, const Tile& tile, const F& f) {
  const Chance chance(key, tile.place);
  int64_t room[kTile];
  const int64_t* places = tile.places;
  if (!places && Chance::splits(tile.place, tile.n)) {
    for (int i = 0; i < kTile; ++i) room[i] = tile.place + i;
    places = room;
  }
  for (int i = 0; i < tile.n; i += kWidth<float>) f(i, places ? chance_at(key, places + i) : chance.at(i));
}

// Rounds to bf16 stochastically. The second values, if there are any, use the other half of the random bits.
inline void dither(uint32_t key, const Tile& tile, float* values, float* second = nullptr) {
  with_chances(key, tile, [&](int i, Bits bits) {
    put(bf16_of(dithered(get(values + i), bits >> 16)), values + i);
    if (second) put(bf16_of(dithered(get(second + i), bits & 0xffff)), second + i);
  });
}
inline void dither(uint32_t, const Tile&, double*, double* = nullptr) {}  // float64 weights keep their state in float64

// The numbers of a tile of codes. Such a tile is a few whole blocks, side by side.
template <bool kSigned>
void decode(const Buffer& codes, const Tile& tile, float* to) {
  using Codes = typename Side<std::conditional_t<kSigned, int8_t, uint8_t>, kWidth<float>>::type;
  using Format = EightBit<kSigned>;
  const char* const from = static_cast<const char*>(codes.data) + tile.place;
  const uint8_t* const scales = codes.scales + tile.place / kScaled;
  for (int i = 0; i < tile.n; i += kScaled) {
    const Vec<float> scale = Format::scale(Bits{} + scales[i / kScaled]);
    for (int j = i; j < i + kScaled; j += kWidth<float>)
      put(Format::decoded(converted<Vec<float>>(read<Codes>(from + j)), scale), to + j);
  }
}

// The codes of a tile of numbers, with 16 random bits for each.
template <bool kSigned>
void encode(const float* from, const uint32_t* chances, const Tile& tile, const Buffer& codes) {
  using Codes = typename Side<std::conditional_t<kSigned, int8_t, uint8_t>, kWidth<float>>::type;
  using Ints = typename Side<int32_t, kWidth<float>>::type;
  using Format = EightBit<kSigned>;
  char* const to = static_cast<char*>(codes.data) + tile.place;
  uint8_t* const scales = codes.scales + tile.place / kScaled;
  for (int i = 0; i < tile.n; i += kScaled) {
    Bits largest = {};
    for (int j = i; j < i + kScaled; j += kWidth<float>) {
      const Bits size = bit_cast<Bits>(get(from + j)) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
    uint32_t most = 0;
    for (int l = 0; l < kWidth<float>; ++l) most = std::max<uint32_t>(most, largest[l]);
    const Bits e = Format::scale_for(Bits{} + most);
    scales[i / kScaled] = uint8_t(e[0]);
    const Vec<float> inverse = Format::inverse(e);
    for (int j = i; j < i + kScaled; j += kWidth<float>)
      write(converted<Codes>(converted<Ints>(Format::code(get(from + j), inverse, read<Bits>(chances + j)))), to + j);
  }
}
template <bool kSigned>
void decode(const Buffer&, const Tile&, double*) {}  // as above
template <bool kSigned>
void encode(const double*, const uint32_t*, const Tile&, const Buffer&) {}

// A buffer as numbers of the arithmetic type, one tile at a time. It uses the memory itself if that already holds this
// type. Otherwise it uses a copy.
template <class T>
class View {
 public:
  explicit View(const Buffer& buffer) : buffer_(buffer) {}
  View(const View&) = delete;

  bool present() const { return buffer_.data != nullptr; }
  bool is(DType dtype) const { return !present() || buffer_.dtype == dtype; }

  // The memory itself, as elements of type S that lie side by side.
  template <class S>
  S* at(const Tile& tile) const {
    return present() ? static_cast<S*>(buffer_.data) + tile.place : nullptr;
  }

  // nullptr when the buffer is absent. read: whether the old numbers are needed. If not, they are only written.
  T* open(const Tile& tile, bool read = true) {
    if (!present()) return nullptr;
    if (direct(tile)) return at<T>(tile);
    if (!read) return stage_;
    if (buffer_.dtype == DType::i8)
      decode<true>(buffer_, tile, stage_);
    else if (buffer_.dtype == DType::u8)
      decode<false>(buffer_, tile, stage_);
    else
      load(buffer_, tile, stage_);
    return stage_;
  }
  // exact: whether all numbers are of the buffer's dtype already.
  void close(const Tile& tile, bool exact = false) {
    if (present() && !direct(tile)) store(stage_, tile, buffer_, exact);
  }
  // The same for codes, rounded by 16 random bits each.
  void close(const Tile& tile, const uint32_t* chances) {
    if (!present()) return;
    buffer_.dtype == DType::i8 ? encode<true>(stage_, chances, tile, buffer_) : encode<false>(stage_, chances, tile, buffer_);
  }

 private:
  bool direct(const Tile& tile) const { return buffer_.dtype == kNative<T> && tile.whole(); }

  const Buffer buffer_;
  alignas(64) T stage_[kTile + kLanes];
};

}  // namespace
}  // namespace robustft
