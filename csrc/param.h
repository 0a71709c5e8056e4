// Param: a tensor of a step, where its numbers are, and how it divides into parts.
#pragma once

#include "vector.h"

namespace robustft {

constexpr int64_t kChunk = 16384;  // elements that share one partial: the unit of a deterministic reduction
constexpr int kBlock = 256;        // elements that are summed in their own type; the sums of blocks are added in double
constexpr int kLanes = 16;         // accumulators of a reduction: the same on every processor, as are the bits

enum class DType : uint8_t { f32, f64, bf16, f16, i8, u8 };  // the last two: codes of moments

// That of numbers which are in memory as they are computed with.
template <class T>
constexpr DType kNative = sizeof(T) == 8 ? DType::f64 : DType::f32;

ROBUSTFT_ANYWHERE constexpr bool is_coded(DType dtype) { return dtype == DType::i8 || dtype == DType::u8; }
ROBUSTFT_ANYWHERE constexpr int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : is_coded(dtype) ? 1 : 2;
}

struct Buffer {
  void* data = nullptr;  // nullptr: absent
  DType dtype = DType::f32;
  uint8_t* scales = nullptr;  // of codes
};

// How a tensor divides into rows. Counted in the order of memory, a row's elements lie in runs of `stride`.
struct Rows {
  int64_t count = 1, length = 0, stride = 0;

  ROBUSTFT_ANYWHERE int64_t numel() const { return count * length; }
  ROBUSTFT_ANYWHERE bool contiguous() const { return count <= 1 || stride == length; }
  ROBUSTFT_ANYWHERE int64_t place(int64_t row, int64_t e) const {
    return contiguous() ? row * length + e : e / stride * (stride * count) + row * stride + e % stride;
  }
};

// What a rule adds to the gradient: linear * d, and sign * sign(d) on one row.
struct Penalty {
  double linear = 0, sign = 0;
  int64_t row = -1;
};

// One tensor of a step, with all that belongs to it. It has several rows if its rule decides or surveys by rows;
// otherwise the whole tensor is one row.
struct Param {
  Rows rows;
  Buffer param;
  Buffer working;   // the 16-bit weights, when param is their float32 master
  Buffer grad;      // may be absent when the base makes no step
  Buffer anchor;    // absent: the anchor is zero
  Buffer state[3];  // AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq; SGD: momentum_buffer
  Buffer delta;     // where c is stored, if it is kept
  Penalty penalty;
  double sign = 1;          // times the gradient, it is the gradient of what the step minimizes
  int64_t seed = 0;         // of the stochastic rounding
  bool dithered = false;    // whether a bf16 param is rounded stochastically
  bool low_state = false;   // whether moments are bf16, which are rounded stochastically
  bool coded_state = false; // whether they are codes
  bool cautious = false;    // whether the pull moves only elements whose step leads toward the anchor
};

// A part of a Param: `rows` rows from `row` on, and the elements [begin, end) of each.
struct Piece {
  int64_t row, rows, begin, end;
};

// A tensor, cut into pieces of at most kChunk elements. A piece is several whole rows, or part of one row.
class Pieces {
 public:
  ROBUSTFT_ANYWHERE explicit Pieces(const Rows& rows)
      : rows_(rows),
        together_(rows.length < kChunk ? kChunk / (rows.length > 0 ? rows.length : 1) : 1),
        parts_(rows.length > kChunk ? (rows.length + kChunk - 1) / kChunk : 1) {}

  ROBUSTFT_ANYWHERE bool split() const { return parts_ > 1; }
  ROBUSTFT_ANYWHERE int64_t parts() const { return parts_; }
  ROBUSTFT_ANYWHERE int64_t count() const {
    return split() ? rows_.count * parts_ : (rows_.count + together_ - 1) / together_;
  }
  ROBUSTFT_ANYWHERE int64_t found() const { return rows_.count * parts_; }  // how many sums the pieces give in all
  ROBUSTFT_ANYWHERE int64_t first_found(int64_t i) const { return split() ? i : i * together_; }
  ROBUSTFT_ANYWHERE Piece operator[](int64_t i) const {
    if (!split()) return {i * together_, i < count() - 1 ? together_ : rows_.count - i * together_, 0, rows_.length};
    const int64_t begin = i % parts_ * kChunk, end = begin + kChunk;
    return {i / parts_, 1, begin, end < rows_.length ? end : rows_.length};
  }

 private:
  Rows rows_;
  int64_t together_, parts_;
};

}  // namespace robustft
