// PieceSums: the sums of a piece on one thread, block after block.
#pragma once

#include "../measure.h"

namespace robustft {
namespace {

template <class T, Measuring kMeasuring>
class PieceSums {
 public:
  using Block = BlockSums<T, kMeasuring, kLanes / kWidth<T>>;

  Block block;  // the one that is being added to

  // Adds the block to the lanes, and begins the next.
  ROBUSTFT_INLINE void next_block() {
    block.each([&](int m, const auto& lanes) {
      for (int k = 0; k < kLanes / kWidth<T>; ++k) {
        auto* const to = lanes_[m] + k * kWidth<T>;
        write(read<Wide>(to) + converted<Wide>(lanes[k]), to);
      }
    });
    block = {};
  }

  // Ends the piece.
  Measures total(double sign) {
    next_block();
    double sums[kMeasures];
    for (int m = 0; m < kMeasures; ++m) {
      sums[m] = 0;
      for (const double lane : lanes_[m]) sums[m] += lane;
    }
    return Measures::of_sums(sums, sign);
  }

 private:
  using Wide = typename Side<double, kWidth<T>>::type;

  alignas(64) double lanes_[kMeasures][kLanes] = {};
};

// The sums of a piece that is one block, of which so many lanes are not 0.
template <class Block>
Measures total_of(const Block& block, double sign, int used) {
  double sums[kMeasures];
  block.each([&](int m, const auto& lanes) {
    constexpr int kEach = kLanes / int(std::extent_v<std::remove_reference_t<decltype(lanes)>>);
    sums[m] = 0;
    for (int l = 0; l < used; ++l) sums[m] += double(lanes[l / kEach][l % kEach]);
  });
  return Measures::of_sums(sums, sign);
}

template <class T>
class PieceSums<T, Measuring::none> {
 public:
  using Block = BlockSums<T, Measuring::none, kLanes / kWidth<T>>;
  Block block;
  ROBUSTFT_INLINE void next_block() {}
  Measures total(double) { return {}; }
};

}  // namespace
}  // namespace robustft
