#include <ATen/Parallel.h>

#include <atomic>

#include "schedule.h"

namespace robustft {

Sums digest(const void* bits, int width, const Indices& indices) {
  int64_t n = 1;
  for (const int64_t size : indices.sizes) n *= size;
  const int64_t length = indices.sizes.back(), outer = int64_t(indices.sizes.size()) - 1;
  std::array<std::atomic<uint64_t>, kDigests> total{};
  at::parallel_for(0, n, kChunk, [&](int64_t begin, int64_t end) {
    Sums sums{};
    while (begin < end) {
      uint64_t first = indices.first + uint64_t(begin % length) * indices.steps.back();
      for (int64_t dim = outer, at = begin / length; dim-- > 0; at /= indices.sizes[dim])
        first += uint64_t(at % indices.sizes[dim]) * indices.steps[dim];
      const int64_t run = std::min(end - begin, length - begin % length);
      sweeps().digest({static_cast<const char*>(bits) + begin * width, width, run, first, uint64_t(indices.steps.back())},
                      sums.data());
      begin += run;
    }
    for (int k = 0; k < kDigests; ++k) total[k].fetch_add(sums[k], std::memory_order_relaxed);
  });
  return {total[0].load(), total[1].load()};
}

}  // namespace robustft
