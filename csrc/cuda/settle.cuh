// Settle: what is left once pieces are measured. The last program of a tensor does what concerns all of it.
#pragma once

#include "piece.cuh"

namespace robustft {
namespace {

// Whether this program is the last of its tensor. What the others have written can then be read.
__device__ bool comes_last(int32_t* counter, int32_t programs, Room& room) {
  __syncthreads();  // the whole program has written what others will read, and read what the last one will write
  if (programs == 1) return true;
  if (threadIdx.x == 0) {
    int32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    room.last = before == programs - 1;
    if (room.last) *counter = 0;
  }
  __syncthreads();
  return room.last;
}

// The sum of n values on all threads of a program. Every thread gets it.
template <class K, class Sum, class At>
__device__ Sum folded_by_all(int64_t n, Sum* room, const At& at) {
  Sum sum{};
  const int64_t groups = groups_of(n);
  for (int64_t first = 0; first < groups; first += K::kThreads) {
    __syncthreads();
    if (first + threadIdx.x < groups) room[threadIdx.x] = group_sum<Sum>(first + threadIdx.x, n, at);
    __syncthreads();
    for (int64_t g = first; g < groups && g < first + K::kThreads; ++g) sum += room[g - first];
  }
  return sum;
}

// The index of the first largest of n values, none of which is nan or negative but those that never count. -1: none.
template <class K, class At>
__device__ int64_t first_largest(int64_t n, double* room, int64_t* places, const At& at) {
  double most = -1;
  int64_t place = -1;
  for (int64_t i = threadIdx.x; i < n; i += K::kThreads)
    if (const double value = at(i); value > most) most = value, place = i;
  __syncthreads();
  room[threadIdx.x] = most, places[threadIdx.x] = place;
  __syncthreads();
  for (int k = 0; k < K::kThreads; ++k)
    if (room[k] > most || (room[k] == most && places[k] >= 0 && places[k] < place)) most = room[k], place = places[k];
  return place;
}

// What was found of a row, whose parts are folded.
__device__ Measures found_of(const Args& args, const Entry& e, int64_t row, int64_t parts) {
  const Measures* const first = args.found + e.found + row * parts;
  return parts == 1 ? *first : folded<Measures>(parts, [&](int64_t part) { return first[part]; });
}

// Decides for the rows of a tensor whose programs are all done.
template <class K>
__device__ void decide_rows(const Args& args, const Entry& e, const Terms& terms, Room& room) {
  const int64_t rows = e.param.rows.count, parts = Pieces(e.param.rows).parts();
  double tied = 1;
  if (e.rule.tied) {  // the largest row's; one that is not finite counts as infinite
    Measures largest;
    for (int64_t row = threadIdx.x; row < rows; row += K::kThreads) {
      const Measures m = found_of(args, e, row, parts);
      if (!isfinite(row_norm(m))) largest.before = kInfinite;
      if (row_norm(m) > row_norm(largest)) largest = m;
    }
    room.sums[threadIdx.x] = largest;
    __syncthreads();
    for (int k = 0; k < K::kThreads; ++k)
      if (row_norm(room.sums[k]) > row_norm(largest)) largest = room.sums[k];
    if (isfinite(row_norm(largest))) tied = alpha_of(e.rule.alpha, largest, terms);
  }
  for (int64_t row = threadIdx.x; row < rows; row += K::kThreads) {
    const Measures m = found_of(args, e, row, parts);
    record(args.results, args.alphas, e.segment + row, m, e.rule.tied ? tied : alpha_of(e.rule.alpha, m, terms),
           args.graded);
  }
  __syncthreads();
}

// Brings a learned radius under the largest row, unless one is not finite.
template <class K>
__device__ void bound_radius(const Args& args, const Entry& e, Room& room) {
  double largest = 0;
  for (int64_t row = threadIdx.x; row < e.param.rows.count; row += K::kThreads) {
    const double n = row_norm(Measures::read(args.results + kResults * (e.segment + row))) + kRowEps;
    largest = !isfinite(n) ? kInfinite : n > largest ? n : largest;
    if (!isfinite(n)) break;
  }
  room.numbers[threadIdx.x] = largest;
  __syncthreads();
  if (threadIdx.x > 0 || e.param.rows.count == 0) return;
  for (int k = 0; k < K::kThreads; ++k) largest = room.numbers[k] > largest ? room.numbers[k] : largest;
  if (largest < e.learned[0]) e.learned[0] = largest;
}

// Records what a round has found, or keeps it for the tensor's last program.
template <class K, bool kRows, class Base, class Hyper>
__device__ __noinline__ void keep_sums(const Args& args, const Setup<Base, Hyper>& s, int64_t row, Room& room) {
  const Round<K> round(s.piece);
  if (threadIdx.x >= round.rows(row)) return;
  const Entry& e = args.entries[s.owner];
  const Measures m = added_up(room, threadIdx.x * round.blocks(), s.base.sign);
  const int64_t program = blockIdx.x - e.program;
  if (kRows && s.at_once) {
    record(args.results, args.alphas, e.segment + row + threadIdx.x, m, alpha_of(e.rule.alpha, m, s.terms), args.graded);
  } else if (kRows) {
    args.found[e.found + Pieces(s.param.rows).first_found(program) + row + threadIdx.x - s.piece.row] = m;
  } else {
    room.total = m;
    if (e.programs > 1) args.found[e.found + program] = m;
  }
}

// What is left once all rows of a program are measured.
template <class K, bool kRows, class Base, class Hyper>
__device__ __noinline__ void conclude(const Args& args, const Setup<Base, Hyper>& s, Room& room) {
  const Entry& e = args.entries[s.owner];
  const bool measures = s.flags.measures, at_once = kRows && s.at_once;
  if (!comes_last(args.counters + s.owner, e.programs, room)) return;
  if (kRows && measures && !at_once) decide_rows<K>(args, e, s.terms, room);
  if (kRows && e.rule.learning != Learning::none) bound_radius<K>(args, e, room);
  if (!kRows && measures) {
    Measures total = room.total;
    if (e.programs > 1)
      total = folded_by_all<K, Measures>(e.programs, room.sums, [&](int64_t i) { return args.found[e.found + i]; });
    if (threadIdx.x == 0)
      record(args.results, args.alphas, e.segment, total, alpha_of(e.rule.alpha, total, s.terms), args.graded);
  }
  if (!measures)  // the caller has given what is recorded, or the rule knows it
    for (int64_t k = threadIdx.x; k < (e.rule.by_rows ? s.param.rows.count : 1); k += K::kThreads) {
      const double alpha = e.rule.given ? args.alphas[e.segment + k] : s.alpha;
      record(args.results, args.alphas, e.segment + k, Measures::filled(std::numeric_limits<double>::quiet_NaN()), alpha,
             args.graded);
    }
  if (Base::kMoves && e.step && threadIdx.x == 0) *e.step = float(s.t);
  __syncthreads();
  if (measures && !at_once && e.programs == 1) pull_piece<K>(s, e.rule.by_rows, args.alphas + e.segment);
}

}  // namespace
}  // namespace robustft
